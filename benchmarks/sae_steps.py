"""Training steps of a TopK dictionary: encode, decode, loss, backward, constraint.

Every subject starts from the same weights and sees the same batch. Nobody's optimizer is timed.
Peers are imported where they are made; one that is missing gives its row a note.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from gemma_ext.ops.sae import decode_error, encode_topk


@dataclass(frozen=True)
class Batch:
    """x [N, D] and unit rows of a dictionary [F, D]; the encoder starts as the decoder."""

    x: Tensor
    weight: Tensor
    k: int


@dataclass(frozen=True)
class Step:
    """`run` makes gradients and keeps the rows of the decoder at norm 1.

    `loss` is the mean of |x - x^|^2 in the last run, `gradient` that of the encoder, [F, D].
    """

    run: Callable[[], None]
    loss: Callable[[], float]
    gradient: Callable[[], Tensor]


def squared(x: Tensor, reconstruction: Tensor) -> float:
    return float((x - reconstruction).detach().float().square().sum(-1).mean())


def ours(b: Batch) -> Step:
    encoder, decoder = (b.weight.clone().requires_grad_() for _ in range(2))
    bias, centre = torch.zeros(len(encoder)), torch.zeros(b.x.shape[1])
    bias.requires_grad_(), centre.requires_grad_()
    found = {}

    def run() -> None:
        for p in (encoder, decoder, bias, centre):
            p.grad = None
        codes = encode_topk(b.x - centre.to(b.x.dtype), encoder, bias, k=b.k).codes
        codes = codes.with_values(torch.relu(codes.values))
        # gradients of the decoder without what is parallel to its rows
        _, error = decode_error(codes, decoder, centre, b.x, unit_norm=True)
        loss = error.mean()
        loss.backward()
        unit_rows(decoder)
        found["loss"] = float(loss.detach())

    return Step(run, lambda: found["loss"], lambda: encoder.grad)


def eager(b: Batch) -> Step:
    encoder, decoder = (b.weight.clone().requires_grad_() for _ in range(2))
    bias, centre = torch.zeros(len(encoder), dtype=b.x.dtype), torch.zeros_like(b.x[0])
    bias.requires_grad_(), centre.requires_grad_()
    found = {}

    def run() -> None:
        for p in (encoder, decoder, bias, centre):
            p.grad = None
        p = torch.relu(torch.nn.functional.linear(b.x - centre, encoder, bias))
        values, indices = p.topk(b.k, dim=-1, sorted=False)
        f = torch.zeros_like(p).scatter(-1, indices, values)
        loss = (b.x - f @ decoder - centre).float().square().sum(-1).mean()
        loss.backward()
        remove_parallel(decoder)
        unit_rows(decoder)
        found["loss"] = float(loss.detach())

    return Step(run, lambda: found["loss"], lambda: encoder.grad)


def sae_lens(b: Batch) -> Step:
    from sae_lens import TopKTrainingSAE, TopKTrainingSAEConfig
    from sae_lens.saes.sae import TrainStepInput

    dtype = str(b.x.dtype).removeprefix("torch.")
    config = TopKTrainingSAEConfig(d_in=b.x.shape[1], d_sae=len(b.weight), k=b.k, dtype=dtype)
    sae = TopKTrainingSAE(config)
    with torch.no_grad():
        sae.W_enc.copy_(b.weight.T)
        sae.W_dec.copy_(b.weight)
    given = TrainStepInput(
        sae_in=b.x,
        coefficients={},
        dead_neuron_mask=None,
        n_training_steps=0,
        is_logging_step=False,
    )
    found = {}

    def run() -> None:
        sae.zero_grad()
        out = sae.training_forward_pass(given)
        out.loss.backward()
        found["out"] = out.sae_out

    return Step(run, lambda: squared(b.x, found["out"]), lambda: sae.W_enc.grad.T)


def dictionary_learning(b: Batch) -> Step:
    from dictionary_learning.trainers.top_k import (
        TopKTrainer,
        remove_gradient_parallel_to_decoder_directions,
        set_decoder_norm_to_unit_norm,
    )

    width, features = b.x.shape[1], len(b.weight)
    trainer = TopKTrainer(
        steps=10_000,
        activation_dim=width,
        dict_size=features,
        k=b.k,
        layer=0,
        lm_name="",
        device="cpu",
    )
    ae = trainer.ae.to(b.x.dtype)
    with torch.no_grad():
        ae.encoder.weight.copy_(b.weight)
        ae.decoder.weight.copy_(b.weight.T)
        ae.encoder.bias.zero_()
        ae.b_dec.zero_()

    def run() -> None:
        ae.zero_grad()
        # step 0 would begin with the median of the batch
        trainer.loss(b.x, step=1).backward()
        ae.decoder.weight.grad = remove_gradient_parallel_to_decoder_directions(
            ae.decoder.weight, ae.decoder.weight.grad, width, features
        )
        ae.decoder.weight.data = set_decoder_norm_to_unit_norm(ae.decoder.weight, width, features)

    return Step(run, lambda: squared(b.x, ae(b.x)), lambda: ae.encoder.weight.grad)


def sparsify(b: Batch) -> Step:
    from sparsify import SparseCoder, SparseCoderConfig

    config = SparseCoderConfig(num_latents=len(b.weight), k=b.k)
    coder = SparseCoder(b.x.shape[1], config, device="cpu", dtype=b.x.dtype)
    with torch.no_grad():
        coder.encoder.weight.copy_(b.weight)
        coder.W_dec.copy_(b.weight)
        coder.encoder.bias.zero_()
        coder.b_dec.zero_()
    found = {}

    def run() -> None:
        coder.zero_grad()
        coder.set_decoder_norm_to_unit_norm()
        out = coder(b.x)
        out.fvu.backward()
        coder.remove_gradient_parallel_to_decoder_directions()
        found["out"] = out.sae_out

    return Step(run, lambda: squared(b.x, found["out"]), lambda: coder.encoder.weight.grad)


def remove_parallel(decoder: Tensor) -> None:
    unit = decoder.detach() / decoder.detach().norm(dim=-1, keepdim=True)
    decoder.grad -= (decoder.grad * unit).sum(-1, keepdim=True) * unit


@torch.no_grad()
def unit_rows(decoder: Tensor) -> None:
    decoder /= decoder.norm(dim=-1, keepdim=True)


STEPS = {
    "gemma_ext": ours,
    "eager": eager,
    "sae-lens": sae_lens,
    "dictionary-learning": dictionary_learning,
    "sparsify": sparsify,
}
