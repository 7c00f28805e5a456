# SPDX-License-Identifier: Apache-2.0
"""The one table of metrics: names, unit, meaning, when it is there, what is healthy.

Tests hold it to what is emitted: a metric without an entry fails, and an entry without a metric.
"""

from opd_ext.report.metrics.entries import COMPARISON, MODELS, SFT_LOG, SUMMARY, Metric, Section

_TRAINED = "if the step trained"
_TAUGHT = "in steps with a teacher"
_APART = "opd.teacher.backend=vllm"
_SEVERAL = "with opd.teachers"
_FOREIGN = "with a teacher of another tokenizer"
_PLACED = "with a colocated teacher"
_FEEDBACK = "context feedback"
_LABELLED = "with an annotator"
_MARKED = "with an annotator, where a rollout has spans"
_AHEAD = "one step off"
_RL = "with a policy term"
_ALONE = "without a teacher"
_AGENTS = "with an agent loop of several turns"
_GRADED = "graders that report it"
_CHECKED = "with a policy term and actor_rollout_ref.rollout.calculate_log_probs"
_WEIGHED = "with algorithm.rollout_correction.rollout_is"

# fmt: off
SECTIONS: tuple[Section, ...] = (
    Section(
        "What was trained", "bridge/update.py",
        (
            Metric("opd/loss", "", "the whole loss of the update", _TRAINED, "finite; falls or stays small"),
            Metric("opd/grad_norm", "", "norm of the gradient before clipping", _TRAINED, "no jumps"),
            Metric("opd/lr", "", "learning rate of the update", _TRAINED),
            Metric("opd/skipped", "0 or 1", "the step had nothing to train on", "", "0, or rarely 1"),
            Metric("opd/scale", "", "weight of the distillation term (opd.credit.weight, annealed)", _TAUGHT),
            Metric("opd/response_tokens", "tokens", "trained response tokens of the batch", _TAUGHT),
            Metric("opd/entropy_diff", "nats", "student's entropy minus the teacher's, on distilled tokens", _TAUGHT,
                "shrinks"),
            Metric("memory/max_memory_allocated_gb memory/max_memory_reserved_gb", "GiB",
                "most memory that tensors, or the allocator, held on one device", _TRAINED, "level"),
            Metric("memory/cpu_memory_used_gb", "GiB", "host memory in use, of all processes", _TRAINED, "level"),
            Metric("alarm/entropy alarm/length alarm/accuracy alarm/divergence alarm/teacher alarm/hacking", "",
                "1: this step raises the alarm; alarms.jsonl says why, and what was done", "if it does", "absent"),
            Metric("training/global_step", "", "the step"),
            Metric("training/epoch", "", "passes over the training data that are complete"),
        ),
    ),
    Section(
        "Per token: student, teacher, divergence", "objective/metrics.py",
        (
            Metric("opd/divergence", "nats", "divergence of student and teacher per distilled token; on the sampled "
                "token the difference of log-probs", _TAUGHT,
                "falls after each refresh of the teacher, then levels off"),
            Metric("opd/divergence_first opd/divergence_middle opd/divergence_last", "nats",
                "the same on the first 100 tokens of a response, on those between, and on the last 100", _TAUGHT),
            Metric("opd/divergence_token0", "nats", "the same on the first token of a response alone", _TAUGHT,
                "large where the prompts of student and teacher end otherwise (with thinking, without)"),
            Metric("opd/divergence_eos opd/divergence_think", "nats",
                "the same where the sampled token is the end of the sequence, or a `<think>` or `</think>`", _TAUGHT,
                "eos small: both agree where to stop"),
            Metric("opd/divergence_key opd/divergence_error", "nats",
                "the same on decisive spans, and on spans that led astray", f"{_TAUGHT}, with an annotator"),
            Metric("opd/student_entropy", "nats",
                "entropy of the student per trained token; without a teacher verl's actor/entropy", "if computed",
                "falls slowly; near 0 the run has collapsed"),
            Metric("opd/distilled_student_entropy", "nats", "the same on distilled tokens alone", _TAUGHT),
            Metric("opd/teacher_entropy", "nats", "entropy of the teacher per distilled token",
                f"{_TAUGHT}, none on backend=server", "near log V the teacher's weights are lost"),
            Metric("opd/student_log_prob", "nats", "log-prob of the sampled tokens, student", _TAUGHT, "rises slowly"),
            Metric("opd/teacher_log_prob", "nats", "log-prob of the sampled, distilled tokens, teacher",
                f"{_TAUGHT}, none on backend=server with support=topk", "the student's comes closer"),
            Metric("opd/distilled_tokens", "share", "trained tokens that are distilled", _TAUGHT,
                "near 1 without spans"),
            Metric("opd/credit", "", "mean credit of distilled tokens, caps included",
                f"{_TAUGHT}; not where all is known before the pass", "stable"),
            Metric("opd/clipped", "share", "vocabulary entries that opd.divergence.clip bounds, mean over distilled "
                "tokens", f"{_TAUGHT}; with a clip", "small"),
            Metric("opd/rollout_gap", "nats", "mean absolute difference of the sampler's and the trainer's log-probs",
                f"{_TAUGHT}, with the sampler's log-probs", "below 1e-4 in fp32; growth: weights out of step"),
        ),
    ),
    Section(
        "The policy that sampled, with asynchronous=one_step_off", "bridge/staleness.py",
        (
            Metric("policy/version", "", "step after which the weights that sampled were synced, mean over rollouts",
                _AHEAD, "the step minus 2"),
            Metric("policy/lag policy/lag_max", "versions",
                "updates between the policy that sampled and the one that the step trains, mean and most", _AHEAD,
                "1; 0 in the first step; above 1 the run ends"),
            Metric("timing_s/drain", "s", "waiting, after the update, for the rollouts of the next batch", _AHEAD,
                "0: sampling is the shorter of the two"),
            Metric("policy/mixed", "share", "rollouts whose tokens are of several versions", _AHEAD,
                "0, or the run ends"),
        ),
    ),
    Section(
        "The teacher's weights", "bridge/schedule.py",
        (
            Metric("teacher/version", "step", "the student's step whose weights teach in this step", "with a teacher"),
            Metric("teacher/age", "steps", "how many steps ago that was; of several the youngest that moves",
                "with a teacher", "a saw-tooth below interval"),
            Metric("teacher/refreshed", "0 or 1", "the weights moved after this step", "with a teacher"),
            Metric("teacher/<name>/version teacher/<name>/age teacher/<name>/refreshed", "", "of each", _SEVERAL),
        ),
    ),
    Section(
        "A teacher on a vLLM of its own", "bridge/teacher_server.py",
        (
            Metric("teacher/served/wait_seconds", "s", "the rank that waited longest for hidden states", _APART,
                "a small part of timing_s/update_actor"),
            Metric("teacher/served/bytes_per_token", "bytes", "of hidden states that came, per response token", _APART,
                "2 x hidden size in bfloat16"),
        ),
    ),
    Section(
        "Several teachers", "objective/metrics.py",
        (
            Metric("teacher/<name>/divergence", "nats", "divergence from it, on its tokens", _SEVERAL, "falls"),
            Metric("teacher/<name>/entropy", "nats", "its entropy on these tokens", f"{_SEVERAL}; colocated"),
            Metric("teacher/<name>/token_share", "share", "distilled tokens that are its own", _SEVERAL),
            Metric("teacher/<name>/context/<word>", "", "what its context counts, as context/...", _SEVERAL),
        ),
    ),
    Section(
        "Which rollouts have a teacher", "bridge/teacher_inputs.py",
        (
            Metric("teacher/samples", "share", "rollouts with a teacher", _PLACED, "1, or as the context decides"),
            Metric("context/another", "share", "rollouts whose teacher could be shown another problem's",
                "opd.context.problem=another", "1, or what has a teacher without the control"),
            Metric("byte_spans/covered", "share", "trained tokens that such a teacher reads; only they are distilled",
                _FOREIGN, "1, less what is cut within a character"),
            Metric("byte_spans/tokens", "tokens", "of the student per span", _FOREIGN, "near 1"),
            Metric("teacher/prompt_tokens_max", "tokens", "the teacher's longest prompt", _PLACED,
                "well below opd.max_pair_length"),
            Metric("rollout/too_long", "share", "rollouts whose pair exceeds opd.max_pair_length", _PLACED, "0"),
        ),
    ),
    Section(
        "Which rollouts leave the batch", "bridge/trainer.py",
        (
            Metric("rollout/dropped", "share", "too long, and no policy term that could train them", _PLACED, "0"),
            Metric("data/filtered", "share", "prompts that verl's filter dropped before the run, too long or refused "
                "by the chat template; of training and validation the larger share", "", "0"),
        ),
    ),
    Section(
        "What the feedback context showed", "context/feedback.py",
        (
            Metric("context/success_group_fraction", "share", "groups with a success", _FEEDBACK, "rises"),
            Metric("context/success_sample_fraction", "share", "rollouts that are shown a demonstration", _FEEDBACK),
            Metric("context/feedback_available_fraction", "share", "rollouts with feedback that could be shown",
                _FEEDBACK),
            Metric("context/feedback_used_fraction", "share", "rollouts whose feedback is shown", _FEEDBACK),
            Metric("context/reprompt_sample_fraction", "share", "rollouts that are shown anything, so have a teacher",
                _FEEDBACK, "well above 0"),
            Metric("context/truncated_sample_fraction", "share", "rollouts whose demonstration or feedback was cut",
                _FEEDBACK, "near 0"),
        ),
    ),
    Section(
        "Rollouts that failed", "bridge/failures.py",
        (
            Metric("rollout/failed val/failed monitor/failed", "share",
                "rollouts that a grader, tool or agent loop did not finish; opd.rollout.failed=zero scores them 0", "",
                "0"),
        ),
    ),
    Section(
        "Rollouts and validation", "bridge/rollouts.py",
        (
            Metric("rollout/accuracy val/accuracy val/<source>/accuracy", "share", "correct responses (acc)", "",
                "val rises; rollout far above val: memorised"),
            Metric("rollout/tokens_mean val/tokens_mean val/<source>/tokens_mean", "tokens",
                "mean length of a response; of several turns what the model wrote", "",
                "falls with crisp; no race to the limit"),
            Metric("rollout/tokens_min val/tokens_min val/<source>/tokens_min", "tokens", "shortest response", "",
                "not 0"),
            Metric("rollout/tokens_max val/tokens_max val/<source>/tokens_max", "tokens", "longest response"),
            Metric("rollout/truncated val/truncated val/<source>/truncated", "share",
                "responses that met the limit of tokens, or turns, without an end", "", "a few percent"),
            Metric("rollout/turns_mean val/turns_mean val/<source>/turns_mean", "turns", "turns of the model", _AGENTS),
            Metric("rollout/environment_tokens_mean val/environment_tokens_mean val/<source>/environment_tokens_mean",
                "tokens", "mean length of what tools said, template included, which trains nowhere", _AGENTS),
            Metric("rollout/tool_calls_mean val/tool_calls_mean val/<source>/tool_calls_mean", "",
                "calls that were made, per rollout", _AGENTS, "falls with crisp"),
            Metric("rollout/tool_failures val/tool_failures val/<source>/tool_failures", "share",
                "calls of tools that do not exist, with arguments that they refuse, or that took too long", _AGENTS,
                "falls"),
            Metric("rollout/ignored_calls val/ignored_calls val/<source>/ignored_calls", "share",
                "rollouts with more calls in one turn than multi_turn.max_parallel_calls", _AGENTS, "0"),
            Metric("rollout/out_of_turns val/out_of_turns val/<source>/out_of_turns", "share",
                "rollouts that called a tool in their last turn, and so have no answer", _AGENTS, "a few percent"),
            Metric("rollout/horizon", "tokens", "how many tokens of a response train, from its first on",
                "`opd.horizon`"),
            Metric("rollout/stopped", "share", "rollouts that were stopped at the horizon, which have no grade",
                "`opd.horizon`", "with stop=false 0"),
            Metric("rollout/empty val/empty val/<source>/empty", "share", "responses without a token", "", "0"),
            Metric("rollout/samples val/samples val/<source>/samples", "", "number of responses", "", "constant"),
            Metric("rollout/acc_strict val/acc_strict val/<source>/acc_strict", "share",
                "correct by the strict policy: a finished response with one final answer", "`rewards.math_dual` grades",
                "as accuracy; far below it: cut, contradictory or unstated answers"),
            Metric("rollout/acc_answer_only val/acc_answer_only val/<source>/acc_answer_only", "share",
                "correct by the stated answer alone, whatever its form", _GRADED, "as accuracy"),
            Metric("rollout/acc_boxed_only val/acc_boxed_only val/<source>/acc_boxed_only", "share",
                "correct by the boxed answer alone", _GRADED, "as accuracy"),
            Metric("rollout/format_ok val/format_ok val/<source>/format_ok", "share", "responses of the required form",
                _GRADED, "near 1"),
            Metric("rollout/pass_at_<k> val/pass_at_<k> val/<source>/pass_at_<k>", "share",
                "problems that at least one of k responses solves, unbiased",
                "if every problem was sampled the same n > 1 times", "does not fall while accuracy rises"),
        ),
    ),
    Section(
        "The monitor of a validation", "bridge/evaluation.py",
        (
            Metric("monitor/<metric> monitor/<source>/<metric>", "as val", "as `val/<metric>`, of the few problems "
                "that opd.validation.monitor looks at", "with a monitor", "as val; compare it with itself alone"),
            Metric("val/asked", "", "0: nothing was due where a resumed run began, between two validations",
                "at such a step"),
        ),
    ),
    Section(
        "What annotation cost and found", "credit/annotate/metrics.py",
        (
            Metric("annotation/calls", "", "rollouts that an annotator was asked about", _LABELLED),
            Metric("annotation/failures", "share", "requests without the annotator's own verdict", _LABELLED,
                "below 0.1, which warns"),
            Metric("annotation/latency_p50_s annotation/latency_p95_s", "s",
                "time to an answer, median and 95th percentile", _LABELLED),
            Metric("annotation/tokens_in annotation/tokens_out", "tokens", "read and written by language models",
                _LABELLED),
            Metric("annotation/ok annotation/empty annotation/skipped", "share",
                "requests that found spans, found none, or were not asked (truncated, empty, too long)", _LABELLED),
            Metric("annotation/wrong_schema annotation/parse_error annotation/timeout annotation/api_error "
                "annotation/align_failure", "share", "requests that failed, by reason", _LABELLED, "0"),
            Metric("spans/rollouts", "share", "rollouts with spans", _LABELLED, "well above 0"),
            Metric("spans/tokens_key spans/tokens_error", "tokens", "marked tokens of the batch, by class", _LABELLED),
            Metric("spans/coverage", "share", "tokens of marked rollouts inside spans", _MARKED,
                "at most opd.credit.annotator.coverage"),
            Metric("spans/coverage_precap", "share", "the same before the cap", _MARKED),
            Metric("spans/capped", "share", "marked rollouts that lost tokens to the cap", _MARKED),
            Metric("spans/centre", "share", "where spans lie in the response: 0 start, 1 end", _MARKED),
        ),
    ),
    Section(
        "Time", "bridge/trainer.py",
        (
            Metric("timing_s/gen", "s", "waiting for rollouts, rewards and annotation"),
            Metric("timing_s/teacher_context", "s", "building the teacher's sequences", "with a teacher", "small"),
            Metric("timing_s/old_log_prob", "s", "log-probs before the update", "where it is a pass of its own"),
            Metric("timing_s/ref", "s", "log-probs of verl's reference policy", "with a KL term"),
            Metric("timing_s/adv", "s", "advantages", _RL, "small"),
            Metric("timing_s/update_actor", "s", "teacher pass, student pass, optimiser", _TRAINED),
            Metric("timing_s/refresh_teacher", "s", "moving the teacher's weights", _TRAINED, "small"),
        ),
    ),
    Section(
        "Time that verl measures", "verl/trainer/ppo/v1/trainer_base.py",
        (
            Metric("timing_s/step", "s", "the whole step, without validation"),
            Metric("timing_s/save_checkpoint", "s", "writing a checkpoint", "in steps that save"),
            Metric("timing_s/testing", "s", "validation", "in steps that validate"),
        ),
    ),
    Section(
        "Time of weight transfer", "verl/trainer/ppo/v1/trainer_sync.py",
        (
            Metric("timing_s/update_weights", "s", "weights to vLLM"),
        ),
    ),
    Section(
        "verl's policy term", "verl/trainer/ppo/core_algos.py",
        (
            Metric("actor/ppo_kl", "nats", "estimate of KL between the policy before and after the update", _RL,
                "about 0 with one update per batch"),
            Metric("actor/pg_clipfrac actor/pg_clipfrac_lower", "share",
                "tokens whose ratio is clipped; the lower bound for negative advantages", f"{_RL}, by loss",
                "a few percent"),
        ),
    ),
    Section(
        "verl's policy term, entropy and KL", "verl/workers/utils/losses.py",
        (
            Metric("actor/pg_loss", "", "the policy term alone", _RL, "around 0, either sign"),
            Metric("actor/entropy_loss", "nats", "entropy during the update", f"{_RL}, with calculate_entropy"),
            Metric("actor/kl_loss actor/kl_coef", "", "KL to the reference policy, and its weight",
                f"{_ALONE}, with use_kl_loss", "grows slowly"),
        ),
    ),
    Section(
        "verl's update without a teacher", "verl/workers/engine_workers.py",
        (
            Metric("actor/loss actor/grad_norm actor/lr", "", "as opd/loss, opd/grad_norm, opd/lr", _ALONE),
        ),
    ),
    Section(
        "verl's trainer", "verl/trainer/ppo/v1/trainer_base.py",
        (
            Metric("actor/entropy", "nats", "entropy of the policy before the update, reduced as the loss is",
                "where old log-probs are computed", "falls slowly"),
            Metric("perf/mfu/actor", "share", "of the device's peak arithmetic that the update used", _ALONE,
                "0 where verl does not know the device"),
        ),
    ),
    Section(
        "verl's KL penalty in the reward", "verl/trainer/ppo/ray_trainer.py",
        (
            Metric("actor/reward_kl_penalty actor/reward_kl_penalty_coeff", "", "the penalty, and its weight",
                f"{_ALONE}, with use_kl_in_reward"),
        ),
    ),
    Section(
        "How even the ranks' loads are", "verl/utils/seqlen_balancing.py",
        (
            Metric("global_seqlen/min global_seqlen/max global_seqlen/mean", "tokens",
                "tokens of a rank (student + teacher) as the batch came: least, most, mean", _TRAINED),
            Metric("global_seqlen/minmax_diff", "tokens", "most minus least", _TRAINED),
            Metric("global_seqlen/balanced_min global_seqlen/balanced_max", "tokens", "the same after balancing",
                _TRAINED, "close to each other"),
        ),
    ),
    Section(
        "Sampler against trainer, probabilities", "verl/utils/debug/metrics.py",
        (
            Metric("training/rollout_probs_diff_max training/rollout_probs_diff_mean training/rollout_probs_diff_std",
                "", "absolute difference of the probabilities of sampled tokens", _CHECKED, "mean near 0"),
            Metric("training/rollout_probs_diff_valid", "0 or 1", "there was a token to compare", _CHECKED, "1"),
            Metric("training/rollout_actor_probs_pearson_corr", "", "correlation of the two", _CHECKED, "near 1"),
        ),
    ),
    Section(
        "Sampler against trainer, perplexity and divergence", "verl/trainer/ppo/rollout_corr_helper.py",
        (
            Metric("rollout_corr/kl rollout_corr/k3_kl", "nats", "two estimates of KL(sampler || trainer) per token",
                _CHECKED, "near 0"),
            Metric("rollout_corr/training_ppl rollout_corr/rollout_ppl", "", "perplexity by trainer and by sampler",
                _CHECKED, "equal"),
            Metric("rollout_corr/training_log_ppl rollout_corr/rollout_log_ppl", "nats", "their logarithms", _CHECKED),
            Metric("rollout_corr/log_ppl_diff rollout_corr/log_ppl_abs_diff rollout_corr/log_ppl_diff_max "
                "rollout_corr/log_ppl_diff_min", "nats", "difference per response: mean, of absolute values, extremes",
                _CHECKED, "near 0"),
            Metric("rollout_corr/ppl_ratio", "", "mean ratio of the perplexities", _CHECKED, "1"),
            Metric("rollout_corr/chi2_token rollout_corr/chi2_seq", "",
                "chi-squared divergence, per token and response", _CHECKED, "near 0"),
        ),
    ),
    Section(
        "Sampler against trainer, importance weights", "verl/trainer/ppo/rollout_corr_helper.py",
        (
            Metric("rollout_corr/rollout_is_mean rollout_corr/rollout_is_std rollout_corr/rollout_is_min "
                "rollout_corr/rollout_is_max", "", "the weights", _WEIGHED, "mean 1"),
            Metric("rollout_corr/rollout_is_eff_sample_size", "share", "effective sample size", _WEIGHED, "near 1"),
            Metric("rollout_corr/rollout_is_ratio_fraction_high rollout_corr/rollout_is_ratio_fraction_low", "share",
                "weights beyond the threshold, above and below", _WEIGHED, "near 0"),
            Metric("rollout_corr/rollout_is_oob_ratio", "share", "weights outside both thresholds",
                f"{_WEIGHED}, two thresholds", "near 0"),
            Metric("rollout_corr/rollout_is_batch_norm_factor", "", "what the weights are divided by",
                f"{_WEIGHED}, rollout_is_batch_normalize", "1"),
            Metric("rollout_corr/rollout_is_seq_<number>", "", "mean weight per response: mean, std, min, max, "
                "max_deviation from 1, fraction_high and _low beyond the threshold", _WEIGHED, "mean 1"),
            Metric("rollout_corr/rollout_rs_<number>", "",
                "rejection sampling: masked shares and statistics per option", "with rollout_correction.rollout_rs",
                "few masked"),
            Metric("actor/rollout_corr/<number>", "", "as rollout_corr/, of every update",
                f"{_ALONE}, opd.policy.anchor=sampler"),
        ),
    ),
    Section(
        "Groups that were replaced", "verl/trainer/ppo/v1/replay_buffer.py",
        (
            Metric("training/filter_groups/evicted_samples", "", "groups of equal rewards that were replaced",
                "with algorithm.filter_groups"),
            Metric("training/filter_groups/discarded_surplus_samples", "", "groups that were sampled and not needed",
                "with algorithm.filter_groups"),
            Metric("training/rollout_failure/evicted_samples", "", "groups that failed and were replaced",
                "if there was one", "absent"),
        ),
    ),
    Section(
        "Fine-tuning (train/<name>/metrics-from-<step>.jsonl of a pipeline)", "verl/trainer/sft_trainer.py",
        (
            Metric("train/loss", "nats", "negative log-prob per token that the loss counts", "", "falls"),
            Metric("train/grad_norm", "", "norm of the gradient before clipping", "", "no jumps"),
            Metric("train/lr", "", "learning rate of the step"),
            Metric("train/mfu", "share", "of the device's peak arithmetic that the step used", "",
                "0 where verl does not know the device"),
            Metric("train/global_tokens", "tokens", "tokens of the step, prompts included"),
            Metric("train/total_tokens(B)", "1e9 tokens", "tokens since the process started"),
        ),
        SFT_LOG,
    ),
    Section(
        "Fine-tuning, memory", "verl/workers/engine_workers.py",
        (
            Metric("perf/max_memory_allocated_gb perf/max_memory_reserved_gb perf/cpu_memory_used_gb", "GiB",
                "as memory/ of a run", "", "level"),
        ),
        SFT_LOG,
    ),
    Section(
        "First against last validation (`opd report`)", "report/run_report.py",
        (
            Metric("group", "", "all, a data source, or a difficulty"),
            Metric("problems samples_before samples_after", "", "how many were compared"),
            Metric("accuracy_before accuracy_after", "%", "correct responses, mean over problems"),
            Metric("accuracy_change", "points", "after minus before", "", "its interval lies above 0"),
            Metric("tokens_before tokens_after", "tokens", "mean length of a response"),
            Metric("tokens_change", "tokens", "after minus before"),
            Metric("tokens_reduction_pct", "%", "1 - after / before", "", "positive where brevity is taught"),
            Metric("truncated_before truncated_after", "%", "responses that met the limit", "", "small"),
            Metric("<statistic>_low <statistic>_high", "", "ends of its 95 % interval, paired by problem"),
        ),
        SUMMARY,
    ),
    Section(
        "Methods side by side (`opd compare`)", "report/compare.py",
        (
            Metric("method seeds step", "", "which runs, how many, and their last validation"),
            Metric("accuracy tokens", "%, tokens", "at the last validation; of a pair: the difference"),
            Metric("area", "points", "difference of mean accuracy over the run, of a pair"),
            Metric("seed_min seed_max", "%", "lowest and highest accuracy of a seed"),
            Metric("<statistic>_low <statistic>_high", "", "ends of its 95 % interval, over problems and seeds"),
            Metric("entropy divergence", "nats", "mean of the last five steps"),
            Metric("generated", "1000 tokens", "sampled in training"),
            Metric("seconds annotator_calls", "", "summed over the steps of a run"),
            Metric("baseline", "", "what a pair's method is compared with"),
            Metric("target steps baseline_steps", "", "the baseline's final accuracy, and when both reach it"),
        ),
        COMPARISON,
    ),
    Section(
        "Models side by side (`evaluation` in the report of a pipeline)", "report/arms.py",
        (
            Metric("model temperature", "", "which model, at the temperature that was chosen for it"),
            Metric("accuracy", "%", "pass@1"),
            Metric("pass_k", "%", "pass@k, k = the samples per problem, at most 5"),
            Metric("tokens truncated", "tokens, %", "mean length; responses that met the limit"),
            Metric("change", "points", "accuracy minus the base's", "", "its interval lies above 0"),
            Metric("<statistic>_low <statistic>_high", "", "ends of its 95 % interval, paired by problem"),
        ),
        MODELS,
    ),
)
