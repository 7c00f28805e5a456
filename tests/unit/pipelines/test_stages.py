# SPDX-License-Identifier: Apache-2.0
"""A stage runs once, goes on with nothing that was made otherwise, and is made again on request only."""

import json

import pytest

from opd_ext.pipelines.stages import Pipeline, Stage, StageError


class Run:
    """Two stages that write files, `b` from what `a` wrote, with a record of what ran."""

    def __init__(self, folder):
        self.folder, self.ran, self.settings, self.fails = folder, [], {"x": 1}, False

    @property
    def pipeline(self):
        return Pipeline(
            self.folder,
            [
                Stage("a", self._a, dict(self.settings), ["a.txt"]),
                Stage("b", self._b, {}, ["b"], after=["a"]),
            ],
        )

    def _a(self):
        self.ran.append("a")
        (self.folder / "a.txt").write_text(str(self.settings["x"]))
        return {"note": 7}

    def _b(self):
        self.ran.append("b")
        if self.fails:
            raise KeyboardInterrupt
        (self.folder / "b").mkdir(exist_ok=True)
        (self.folder / "b" / "file").write_text((self.folder / "a.txt").read_text())


@pytest.fixture
def run(tmp_path):
    return Run(tmp_path / "run")


def test_what_is_done_is_not_done_again(run):
    run.pipeline.run()
    run.pipeline.run()
    assert run.ran == ["a", "b"]
    assert run.pipeline.record("a")["notes"] == {"note": 7}
    assert [state for _, state, _ in run.pipeline.overview()] == ["done", "done"]


def test_an_interrupted_stage_runs_again_and_only_that(run):
    run.fails = True
    with pytest.raises(KeyboardInterrupt):
        run.pipeline.run()
    assert [state for _, state, _ in run.pipeline.overview()] == ["done", "begun"]
    run.fails = False
    run.pipeline.run()
    assert run.ran == ["a", "b", "b"]


def test_other_settings_are_refused_and_named(run):
    run.pipeline.run()
    run.settings["x"] = 2
    with pytest.raises(StageError, match="x=1, not 2.*--force a"):
        run.pipeline.run()
    assert (run.folder / "a.txt").read_text() == "1"


def test_settings_of_a_begun_stage_are_held_to_as_well(run):
    run.fails = True
    with pytest.raises(KeyboardInterrupt):
        run.pipeline.run()
    manifest = json.loads((run.folder / "manifest.json").read_text())
    manifest["b"]["settings"] = {"lr": 1}
    (run.folder / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(StageError, match="lr=1, not None"):
        run.pipeline.run()


def test_force_makes_a_stage_and_what_depends_on_it_again(run):
    run.pipeline.run()
    run.settings["x"] = 2
    run.pipeline.run(force="a")
    assert run.ran == ["a", "b", "a", "b"]
    assert (run.folder / "b" / "file").read_text() == "2"


def test_what_comes_out_the_same_spares_what_follows(run):
    run.pipeline.run()
    run.pipeline.run(force="a")
    assert run.ran == ["a", "b", "a"]


def test_a_changed_file_is_refused(run):
    run.pipeline.run()
    (run.folder / "a.txt").write_text("edited")
    with pytest.raises(StageError, match="a.txt is not what stage 'a' wrote"):
        run.pipeline.run()


def test_a_lost_file_is_made_again(run):
    run.pipeline.run()
    (run.folder / "a.txt").unlink()
    run.pipeline.run()
    assert run.ran == ["a", "b", "a"]


def test_until_and_only(run):
    with pytest.raises(StageError, match="'b' comes after 'a', which is not done"):
        run.pipeline.run(only="b")
    run.pipeline.run(until="a")
    assert run.ran == ["a"]
    run.pipeline.run(only="b")
    assert run.ran == ["a", "b"]
    with pytest.raises(StageError, match="no stage 'c'; the stages are a, b"):
        run.pipeline.run(until="c")


def test_two_processes_do_not_share_a_folder(run):
    run.pipeline.run()
    with run.pipeline._alone(), pytest.raises(StageError, match="Another process works in"):
        run.pipeline.run()


def test_what_a_stage_owns_goes_with_it(run):
    """A fine-tuning that is made anew must not go on from the state that the old one left."""

    def pipeline():
        def train():
            state = run.folder / "train" / "state"
            went_on = state.exists()
            state.parent.mkdir(exist_ok=True)
            state.write_text("optimiser")
            (run.folder / "model.txt").write_text(f"of {(run.folder / 'a.txt').read_text()}, went on: {went_on}")
            if run.fails:
                raise KeyboardInterrupt

        stages = [Stage("a", run._a, dict(run.settings), ["a.txt"])]
        stages.append(Stage("train", train, {}, ["model.txt"], ["a"], owns=["train", "other-*"]))
        return Pipeline(run.folder, stages)

    run.fails = True
    with pytest.raises(KeyboardInterrupt):
        pipeline().run()
    run.fails = False
    pipeline().run()
    assert (run.folder / "model.txt").read_text() == "of 1, went on: True"
    (run.folder / "other-1").write_text("")
    pipeline().run(force="train")
    assert (run.folder / "model.txt").read_text() == "of 1, went on: False" and not (run.folder / "other-1").exists()
    run.settings["x"] = 2
    pipeline().run(force="a")  # its input changed
    assert (run.folder / "model.txt").read_text() == "of 2, went on: False"
    (run.folder / "model.txt").unlink()  # its output was lost
    pipeline().run()
    assert (run.folder / "model.txt").read_text() == "of 2, went on: False"


def test_force_that_would_only_destroy_is_refused(run):
    run.pipeline.run()
    for options in ({"only": "b"}, {"only": "a", "until": "b"}):
        with pytest.raises(StageError, match="--force .* would not make"):
            run.pipeline.run(force="b" if options["only"] == "a" else "a", **options)
    with pytest.raises(StageError, match="--force b would not make"):
        run.pipeline.run(force="b", until="a")
    assert (run.folder / "a.txt").exists() and (run.folder / "b").exists()


def test_a_stage_that_makes_nothing_is_not_done(run):
    pipeline = Pipeline(run.folder, [Stage("a", lambda: None, {}, ["a.txt"])])
    with pytest.raises(StageError, match="ended without making a.txt"):
        pipeline.run()
    assert [state for _, state, _ in pipeline.overview()] == ["begun"]


def test_a_stage_that_refuses_its_input_never_began(run):
    def refuse():
        raise ValueError("lower x")

    with pytest.raises(ValueError, match="lower x"):
        Pipeline(run.folder, [Stage("a", refuse, {"x": 1}, ["a.txt"])], (ValueError,)).run()
    run.pipeline.run(only="a")
    assert (run.folder / "a.txt").exists()


def test_a_stage_of_an_older_release_counts_under_the_new_name_of_its_grader(run):
    """A finished run folder keeps its value: `rewards.tinymath` became `tinymath.grader` after release 0.1."""
    run.settings["reward"] = {"path": "pkg://opd_ext.rewards.tinymath"}
    run.pipeline.run()
    run.settings["reward"] = {"path": "pkg://opd_ext.tinymath.grader"}
    run.pipeline.run()
    assert run.ran == ["a", "b"]
