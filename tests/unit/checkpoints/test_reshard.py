# SPDX-License-Identifier: Apache-2.0
"""A checkpoint of some ranks, loaded on others: real FSDP2 shards over gloo, in one process group of four.

Within it, worlds of 1, 2, 3 and 4 ranks and one of two replicas (HSDP) train a small model with AdamW and save it in
verl's layout; every world then loads the checkpoint of every other one.
"""

import socket
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from opd_ext.checkpoints import reshard
from opd_ext.checkpoints.layout import EXTRA, MODEL, OPTIMISER, TEACHER, CheckpointError, shard_name
from opd_ext.checkpoints.shards import Sharded, Shards

RANKS = 4
# name -> ranks, and the mesh of them
WORLDS = {"1": [0], "2": [0, 1], "3": [0, 1, 2], "4": [0, 1, 2, 3], "2x2": [[0, 1], [2, 3]]}


class Net(nn.Module):
    """Odd sizes, so that shards differ, some of them empty; a tied head and a buffer."""

    def __init__(self):
        super().__init__()
        self.embed, self.layer = nn.Embedding(7, 3), nn.Linear(3, 3)
        self.head = nn.Linear(3, 7, bias=False)
        self.head.weight = self.embed.weight
        self.register_buffer("scale", torch.tensor([0.5, 2.0]))

    def forward(self, ids):
        return self.head(self.layer(self.embed(ids))) * self.scale[0]


def build(mesh: DeviceMesh, seed: int):
    torch.manual_seed(seed)
    net = fully_shard(Net(), mesh=mesh)
    optimiser = torch.optim.AdamW(net.parameters(), lr=0.1)
    return net, optimiser, torch.optim.lr_scheduler.LambdaLR(optimiser, lambda step: 1 / (1 + step))


def whole(value):
    return value.full_tensor() if isinstance(value, DTensor) else value


def contents(net, optimiser, scheduler) -> dict:
    """Everything that matters, whole (collective)."""
    state = optimiser.state_dict()
    moments = {f"{i}.{key}": whole(v) for i, entry in state["state"].items() for key, v in entry.items()}
    weights = {name: whole(value) for name, value in net.state_dict().items()}
    return {"weights": weights, "moments": moments, "lr": optimiser.param_groups[0]["lr"], "last": scheduler.last_epoch}


def same(ours: dict, theirs: dict) -> bool:
    tensors = all(
        ours[part].keys() == theirs[part].keys()
        and all(torch.equal(ours[part][k], theirs[part][k]) for k in ours[part])
        for part in ("weights", "moments")
    )
    return tensors and (ours["lr"], ours["last"]) == (theirs["lr"], theirs["last"])


def plain(net) -> dict:
    """Of a teacher: distinct tensors."""
    return {name: tensor.detach() for name, tensor in net.state_dict(keep_vars=True).items() if name != "head.weight"}


def save(folder: Path, world: str, rank: int, mesh: DeviceMesh) -> dict:
    net, optimiser, scheduler = build(mesh, seed=1)
    for step in range(3):
        net(torch.tensor([[step, 6]])).square().sum().backward()
        optimiser.step()
        optimiser.zero_grad()
        scheduler.step()
    ranks = mesh.size()
    folder.mkdir(exist_ok=True)
    if mesh.ndim == 1 or mesh.get_local_rank(0) == 0:
        torch.save(net.state_dict(), folder / shard_name(MODEL, ranks, rank))
        torch.save(optimiser.state_dict(), folder / shard_name(OPTIMISER, ranks, rank))
        (folder / "teacher").mkdir(exist_ok=True)
        local = {name: t.to_local() if isinstance(t, DTensor) else t for name, t in plain(net).items()}
        torch.save(local, folder / "teacher" / shard_name(TEACHER, ranks, rank))
    extra = {"lr_scheduler": scheduler.state_dict(), "rng": {"cpu": torch.full((1,), rank)}}
    torch.save(extra, folder / shard_name(EXTRA, ranks, rank))
    return contents(net, optimiser, scheduler)


def load(folder: Path, rank: int, mesh: DeviceMesh) -> tuple[dict, dict, dict | None]:
    net, optimiser, scheduler = build(mesh, seed=2)
    reshard.load_weights(net, Shards(folder, MODEL))
    reshard.load_optimiser(optimiser, folder)
    rng = reshard.load_extra(scheduler, folder, rank)
    teacher, _, _ = build(mesh, seed=3)
    reshard.load_teacher(plain(teacher), folder / "teacher")
    found = contents(net, optimiser, scheduler)
    return found, {name: whole(value) for name, value in teacher.state_dict().items()}, rng


def job(rank: int, port: int, folder: Path) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=RANKS)
    meshes = {}
    for name, ranks in WORLDS.items():
        names = ("ddp", "fsdp") if name == "2x2" else ("fsdp",)
        meshes[name] = DeviceMesh("cpu", ranks, mesh_dim_names=names)
    saved = {}
    for name, mesh in meshes.items():
        if mesh.get_coordinate() is not None:
            saved[name] = save(folder / name, name, rank, mesh)
        torch.distributed.barrier()
    told = {}
    for source in WORLDS:
        for target, mesh in meshes.items():
            if mesh.get_coordinate() is not None:
                found, teacher, rng = load(folder / source, rank, mesh)
                told[source, target] = found, teacher, rng
    torch.save((saved, told), folder / f"rank_{rank}.pt")
    torch.distributed.destroy_process_group()


@pytest.fixture(scope="module")
def group(tmp_path_factory):
    """folder, and per rank: world -> what it saved; (saved by, loaded on) -> what it loaded."""
    folder = tmp_path_factory.mktemp("reshard")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    torch.multiprocessing.spawn(job, (port, folder), nprocs=RANKS)
    return folder, [torch.load(folder / f"rank_{rank}.pt", weights_only=False) for rank in range(RANKS)]


@pytest.mark.parametrize("target", WORLDS)
@pytest.mark.parametrize("source", WORLDS)
def test_weights_moments_and_schedule_are_equal_on_any_number_of_ranks(group, source, target):
    _, ranks = group
    expected = ranks[0][0][source]
    assert max(value.abs().max() for value in expected["moments"].values()) > 0, "it has trained"
    for rank, (_, told) in enumerate(ranks):
        if (source, target) in told:
            found, teacher, rng = told[source, target]
            assert same(found, expected)
            assert all(torch.equal(teacher[name], value) for name, value in expected["weights"].items())
            size = len(torch.tensor(WORLDS[source]).flatten())
            assert (rng is None) == (rank >= size), "a rank that was there goes on with its RNG"
            assert rng is None or rng["cpu"].item() == rank


def test_replicas_are_read_once(group):
    folder, _ = group
    assert sorted(path.name for path in (folder / "2x2").glob(f"{MODEL}*")) == [
        shard_name(MODEL, 4, 0),
        shard_name(MODEL, 4, 1),
    ]
    assert not reshard.fits(folder / "2x2", MODEL, 4), "verl would look for files of all four"
    assert reshard.fits(folder / "4", MODEL, 4) and not reshard.fits(folder / "4", MODEL, 2)


def test_a_shard_that_is_missing_or_cut_off_is_one_sentence(group, tmp_path):
    folder, _ = group
    for kept, match in ((0, "rows, its shape is"), (1, "rows, its shape is")):
        part = tmp_path / str(kept)
        part.mkdir()
        name = shard_name(MODEL, 2, kept)
        (part / name).write_bytes((folder / "2" / name).read_bytes())
        with pytest.raises(CheckpointError, match=match):
            Shards(part, MODEL)["embed.weight"]
        (part / name).write_bytes((folder / "2" / name).read_bytes()[:-200])
        with pytest.raises(CheckpointError, match="cannot be read"):
            Shards(part, MODEL)
    with pytest.raises(CheckpointError, match="holds no shards"):
        Shards(tmp_path, MODEL)
    (tmp_path / shard_name(MODEL, 2, 0)).touch()
    (tmp_path / shard_name(MODEL, 3, 0)).touch()
    with pytest.raises(CheckpointError, match="shards of 2 and 3 ranks side by side"):
        Shards(tmp_path, MODEL)


def test_a_checkpoint_of_another_model_is_refused(group):
    folder, _ = group
    other = nn.Linear(3, 3)
    with pytest.raises(CheckpointError, match="of another model"):
        reshard.load_weights(other, Shards(folder / "2", MODEL))
    with pytest.raises(CheckpointError, match="of another model"):
        reshard.load_teacher(dict(other.state_dict()), folder / "2" / "teacher")
    with pytest.raises(CheckpointError, match="3 parameters, the model 2"):
        reshard.load_optimiser(torch.optim.AdamW(other.parameters()), folder / "2")
    with pytest.raises(CheckpointError, match=r"shape \(3, 3\) in the checkpoint and \(4, 3\)"):
        Sharded("w", [torch.zeros(3, 3)], (3, 3), 0).like(torch.zeros(4, 3))


def test_a_checkpoint_of_an_adapter_alone_leaves_the_base_as_it_is():
    net = nn.ModuleDict({"base": nn.Linear(2, 2, bias=False), "lora_A": nn.Linear(2, 2, bias=False)})
    base = net["base"].weight.detach().clone()
    saved = torch.full((2, 2), 7.0)
    reshard.load_weights(net, {"lora_A.weight": Sharded("lora_A.weight", [saved], (2, 2), None)})
    assert torch.equal(net["lora_A"].weight, saved) and torch.equal(net["base"].weight, base)
