"""Two gloo ranks against one process that sees the batches of both: `checks_ranks.py DIR`."""

import dataclasses
import json
import multiprocessing
import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from tiny_gemma2 import D, tiny_model, tiny_rows

from gemma_ext.nn.sparse_autoencoder import BatchTopK, Objective, SparseAutoencoder, TopK
from gemma_ext.sae import Activations, TrainConfig, Trainer

F, STEPS = 48, 25


class Joint(Activations):
    """Both ranks' batches as one."""

    def batches(self, first=0):
        ranks = [
            dataclasses.replace(
                Activations(self.models, self.sites, self.tokens, 64, self.buffer, self.rows),
                rank=rank,
                world=2,
            )
            for rank in (0, 1)
        ]
        for parts in zip(*(rank.batches(first) for rank in ranks), strict=True):
            yield torch.cat(parts)


def trained(out, kind, batch, activation, rank=0, world=1):
    torch.manual_seed(3)
    sae = SparseAutoencoder(D, F, activation)
    torch.nn.init.normal_(sae.encoder, std=0.3)
    stream = kind([tiny_model()], ["1"], tiny_rows(40), batch, 200, 8, rank=rank, world=world)
    config = TrainConfig(STEPS, dead_after=300, save_every=10)
    run = Trainer(sae, Objective(), stream, config, out)
    run.initialise = lambda: None  # it looks at one rank's first batch
    run.run()
    return run


def rank_main(rank, folder):
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder / 'store'}", rank=rank, world_size=2
    )
    run = trained(folder / "two", Activations, 64, TopK(4), rank, 2)
    state = {"sae": run.sae.state_dict(), "dead": run.dead.state_dict()}
    torch.save(state, folder / f"{rank}.pt")
    batch = trained(folder / "batch", Activations, 64, BatchTopK(4), rank, 2)
    torch.save(batch.sae.state_dict(), folder / f"batch-{rank}.pt")
    dist.destroy_process_group()


def main(folder):
    torch.set_num_threads(1)
    fork = multiprocessing.get_context("fork")
    ranks = [fork.Process(target=rank_main, args=(rank, folder)) for rank in (0, 1)]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join(150)
        process.kill()
    a, b = (torch.load(folder / f"{rank}.pt") for rank in (0, 1))
    for name, value in a["sae"].items():
        assert torch.equal(value, b["sae"][name]), name
    one = trained(folder / "one", Joint, 128, TopK(4))
    for name, value in one.sae.state_dict().items():
        torch.testing.assert_close(a["sae"][name], value, rtol=1e-3, atol=1e-4)
    for name, value in one.dead.state_dict().items():
        assert torch.equal(a["dead"][name], value), name
    a, b = (torch.load(folder / f"batch-{rank}.pt") for rank in (0, 1))
    for name, value in a.items():
        assert torch.equal(value, b[name]), name  # the running threshold among them
    (folder / "done.json").write_text(json.dumps("ok"))


if __name__ == "__main__":
    sys.path.insert(0, os.path.dirname(__file__))
    main(Path(sys.argv[1]))
