# SPDX-License-Identifier: Apache-2.0
"""One process of a group: ``python -m tests.stack.group_of_ranks FILE`` writes who met whom."""

import json
import os
import sys
from pathlib import Path

import psutil
import torch

from opd_ext.bridge.cpu_platform import init_process_group

init_process_group()
own = {name: os.environ[name] for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE")}
own["raylet"] = psutil.Process(os.getppid()).ppid()  # a rank's parent is a Ray task, whose parent is its node's raylet
everybody: list = [None] * torch.distributed.get_world_size()
torch.distributed.all_gather_object(everybody, own)
if torch.distributed.get_rank() == 0:
    Path(sys.argv[1]).write_text(json.dumps(everybody))
torch.distributed.destroy_process_group()
