# SPDX-License-Identifier: Apache-2.0
"""Size and pre-training of the tools' model; the tools as verl takes them."""

from __future__ import annotations

from dataclasses import dataclass

from opd_ext.tinymath.pretrain import ModelSpec
from opd_ext.tinymath.tools.chats import ToolCorpus, chats, textbook

MAX_NEW_TOKENS = 96
"""Of one turn."""

TOOLS_FILE = '''\
"""The tools of this world: what actor_rollout_ref.rollout.multi_turn.function_tool_path names."""

from verl.tools.function_tool import function_tool

from opd_ext.tinymath.tools.problems import calculate, look_up

function_tool(look_up)
function_tool(calculate)
'''


@dataclass(frozen=True)
class ToolSpec(ModelSpec):
    """A model of the tools' level."""

    def phases(self) -> tuple[tuple[ToolCorpus, int], ...]:
        return (textbook(), self.textbook_chats), (chats(self.slip_scale), self.chats)


SPECS: dict[str, ModelSpec] = {
    "base": ToolSpec(
        hidden_size=128,
        layers=3,
        heads=4,
        kv_heads=2,
        intermediate_size=256,
        textbook_chats=9_000,
        chats=10_000,
    ),
}
