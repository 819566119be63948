"""Two gloo ranks against one process that has the batches of both: `checks_ppo_ranks.py DIR KIND`.

KIND: "plain" weights, "apart" (another start and an idle weight on each rank), "ddp"
(DistributedDataParallel), "adapters" (of two roles below it), "accelerate" (which puts it there),
"fsdp" (FSDP2, interrupted), "fsdp critic" (one of its own, sharded too), "fsdp root" (in one unit),
or "pieces" (two ranks, in two goes).
"""

from __future__ import annotations

import json
import os
import sys
from contextlib import suppress
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from toy_ppo import LIKED, tiny, trainer, weights

from gemma_ext.nn.ppo import AdapterCritic, AdapterOffReference, FrozenReference, with_adapters
from gemma_ext.ppo import PPOTrainer
from gemma_ext.ppo.ranks import rank as rank_of


def liked(completion_ids, **columns):
    return [ids.count(LIKED) / len(ids) for ids in completion_ids]


class Interrupted(Exception):
    pass


def interrupt(made, step, line):
    if step == 2:
        raise Interrupted


def sharded(model, kind: str):
    mesh = init_device_mesh("cpu", (2,))
    for layer in model.model.layers if kind != "fsdp root" else ():
        fully_shard(layer, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def with_two_roles(model):
    from peft import LoraConfig

    torch.manual_seed(3)
    return with_adapters(model, LoraConfig(r=2, target_modules=["q_proj", "up_proj"]), "value")


def prepared(model, world: int):
    from accelerate import Accelerator

    if world > 1:  # as a launcher tells it; the group is there
        place = {"RANK": rank_of(), "LOCAL_RANK": rank_of(), "WORLD_SIZE": world}
        place |= {"MASTER_ADDR": "localhost", "MASTER_PORT": 29500}
        os.environ.update({name: str(value) for name, value in place.items()})
    made = Accelerator(cpu=True).prepare(model)
    assert isinstance(made, DistributedDataParallel) == (world > 1)
    return made


def run(folder: Path, kind: str, world: int, *, stop: bool = False) -> PPOTrainer:
    policy, reference = tiny(), {}
    if kind == "apart":
        policy, reference = tiny(seed=7 * rank_of()), {"reference": None}
        policy.idle = torch.nn.Parameter(torch.ones(3))
    if kind in ("ddp", "accelerate"):
        reference = {"reference": FrozenReference(tiny())}
    if kind == "adapters":
        policy = with_two_roles(policy)
    if kind in ("ddp", "adapters") and world > 1:
        policy = DistributedDataParallel(policy)
    if kind == "accelerate":
        policy = prepared(policy, world)
    if kind == "adapters":
        reference = {"value": AdapterCritic(policy), "reference": AdapterOffReference(policy)}
    if kind.startswith("fsdp"):
        reference = {"reference": FrozenReference(tiny())}
        if kind == "fsdp critic":
            critic = tiny(seed=3)
            reference["value"] = sharded(critic, kind) if world > 1 else critic
        policy = sharded(policy, kind) if world > 1 else policy
    # large epsilon: Adam's first step is the sign of a gradient, which rounding may turn
    made = trainer(
        folder,
        steps=4,
        parts={"policy": policy, "rewards": liked} | reference,
        per_device_train_batch_size=4 // world,
        gradient_accumulation_steps=2,
        save_steps=1,
        adam_epsilon=1e-2,
        whiten_rewards=True,
        missing_eos_penalty=0.1,
        aggregation="seq-mean-token-mean",
        weight_decay=0.1,
    )
    if stop:
        made.callbacks.append(interrupt)
    with suppress(Interrupted):
        made.train()
    return made


def state_of(made: PPOTrainer) -> dict:
    found = {
        k.replace("policy.module.", "policy."): v.full_tensor() if isinstance(v, DTensor) else v
        for k, v in weights(made).items()
    }
    return {"weights": found, "history": list(made.history)}


def rank_main(rank: int, folder: Path, kind: str) -> None:
    torch.set_num_threads(1)
    store = f"file://{folder / 'store'}"
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=2)
    if kind in ("pieces", "fsdp"):
        run(folder / "two", kind, 2, stop=True)
    made = run(folder / "two", kind, 2)
    torch.save(state_of(made), folder / f"{rank}.pt")
    dist.destroy_process_group()


def main(folder: Path, kind: str) -> None:
    children = []
    for rank in range(2):
        child = os.fork()
        if child == 0:
            try:
                rank_main(rank, folder, kind)
            except BaseException as error:
                print(f"rank {rank}: {type(error).__name__}: {error}", file=sys.stderr, flush=True)
                os._exit(1)
            os._exit(0)
        children.append(child)
    torch.set_num_threads(1)
    one = state_of(run(folder / "one", kind, 1))
    assert all(os.waitpid(child, 0)[1] == 0 for child in children)
    two = [torch.load(folder / f"{rank}.pt") for rank in range(2)]
    found = {
        "weights": apart(one, two[0]),
        "ranks": apart(*two),
        "lines": told(one, two[0]),
        "rewards": [line["rewards/liked/std"] for line in one["history"]],
    }
    print(json.dumps(found))


def apart(a: dict, b: dict) -> float:
    names = a["weights"].keys() & b["weights"].keys()
    assert len(names) == len(a["weights"])
    return max(float((a["weights"][n] - b["weights"][n]).abs().max()) for n in names)


def told(a: dict, b: dict) -> dict[str, float]:
    """The largest difference of each metric."""
    found: dict[str, float] = {}
    for one, two in zip(a["history"], b["history"], strict=True):
        for name in one.keys() | two.keys():
            if not name.startswith("time/"):
                found[name] = max(found.get(name, 0.0), abs(one[name] - two[name]))
    return found


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
