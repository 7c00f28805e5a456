# SPDX-License-Identifier: Apache-2.0
"""``opd.context``: its keys, their check and their words."""

import dataclasses
from dataclasses import dataclass, field
from typing import Any

from opd_ext.context.another import ANOTHER, OWN, AnotherProblem
from opd_ext.context.base import NoContext, TeacherContext, context_names, get_context
from opd_ext.errors import ABSENT, ConfigError, check_options, check_types, one_of


@dataclass
class ContextConfig:
    """What the teacher sees that the student does not; every other key is an option of that context."""

    kind: str = "same"  # a registered context: same, instruction, solution, feedback, label, ...
    args: dict[str, Any] = field(default_factory=dict)  # options of the context; write them beside `kind`
    problem: str = OWN
    """A control: own | another (what is shown of a problem is another problem's)."""

    @property
    def present(self) -> bool:
        return self.kind != ABSENT

    @property
    def in_turns(self) -> bool:
        """Whether it speaks in later turns of a rollout, too."""
        return build_context(self).in_turns

    def check(self) -> None:
        """Refuse what cannot work, whatever the other places say.

        Raises:
            ConfigError: one sentence.
        """
        one_of("opd.context.kind", self.kind, context_names())
        one_of("opd.context.problem", self.problem, (OWN, ANOTHER))
        options = {entry.name for entry in dataclasses.fields(get_context(self.kind))} - {"tokenizer"}
        check_options("opd.context", f"kind={self.kind}", self.args, options)
        check_types("opd.context", get_context(self.kind), self.args)
        try:
            build_context(self)
        except (TypeError, ValueError) as error:
            raise ConfigError(f"opd.context: {str(error).removesuffix('.')}.") from None

    def __str__(self) -> str:
        shown = self.args.get("text")
        return (f"{self.kind}:{shown}" if shown else self.kind) + (" of another problem" * (self.problem == ANOTHER))


def build_context(config: ContextConfig, tokenizer: Any = None) -> TeacherContext:
    """The context named ``config.kind`` with the options ``config.args``.

    Args:
        tokenizer: the tokenizer of the run, for contexts that measure texts in tokens. Without it such a context
            can be built, to check its options, but not used.

    Raises:
        ValueError: an unknown kind, or an option that the context refuses.
        TypeError: an option that the context does not have.
    """
    if config.kind == ABSENT:
        return NoContext()
    kind = get_context(config.kind)
    wants_tokenizer = any(option.name == "tokenizer" for option in dataclasses.fields(kind))
    context = kind(**config.args, **({"tokenizer": tokenizer} if wants_tokenizer else {}))
    return AnotherProblem(context, config.kind) if config.problem == ANOTHER else context
