# SPDX-License-Identifier: Apache-2.0
"""What a preflight has seen: facts for the plan, and notes on what works but is hardly what was meant."""

from dataclasses import dataclass, field

from opd_ext.errors import ConfigError


@dataclass
class Findings:
    """Facts are rows of the plan; a note is one sentence. What cannot work is no finding but a ConfigError."""

    facts: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def fact(self, subject: str, text: str) -> None:
        self.facts[subject] = text

    def note(self, sentence: str) -> None:
        self.notes.append(sentence)


def refuse(sentence: str, error: BaseException) -> ConfigError:
    """The refusal, followed by the first line of what a library or a user's module said in the first place."""
    cause = error.__cause__ or error
    lines = [line.strip() for line in str(cause).split("\n") if line.strip()]
    said = f"{type(cause).__name__}: {lines[0]}" if lines else type(cause).__name__
    return ConfigError(f"{sentence} ({said.rstrip('.')}).")
