"""Linear cross-entropy of a head whose vocabulary is spread over the ranks of a group.

Rank r holds the classifier rows of its shard and computes lse, target logit and mean logit over
them alone; the ranks exchange a few [N] vectors and every rank returns the loss of the whole
vocabulary. No rank holds logits, nor the other ranks' classifier rows or their gradient. Backward:
dC stays local, dE is one SUM all-reduce in float32.
"""

from __future__ import annotations

import torch.distributed as dist
from torch import Tensor

from gemma_ext.distributed._rows import vocab_parallel_rows
from gemma_ext.distributed._shards import (
    VocabShard,
    local_bias,
    local_head,
    local_replica,
    resolve_group,
    resolve_shard,
    vocab_shard_range,
)
from gemma_ext.ops.cce import Head, LinearCrossEntropyOutput, LossTerms, Method
from gemma_ext.ops.cce.inputs import check_labels, check_problem, check_vector
from gemma_ext.ops.cce.logprobs import (
    LinearLogprobsOutput,
    check_reference,
    estimate_kl,
    fields_of,
    given_logprobs,
)
from gemma_ext.ops.cce.loss import Wanted, assemble, weigh
from gemma_ext.ops.vocab_state import warn_ignored


def vocab_parallel_linear_cross_entropy(
    e: Tensor,
    c_local: Tensor,
    targets: Tensor,
    *,
    bias: Tensor | None = None,
    group: dist.ProcessGroup | None = None,
    vocab_start: int | None = None,
    vocab_size: int | None = None,
    reduce_e_grad: bool = True,
    validate: bool = True,
    ignore_index: int = -100,
    softcap: float | None = None,
    reduction: str = "mean",
    shift: int | bool = 0,
    return_lse: bool = False,
    filter_eps: float | str | None = "auto",
    impl: str = "auto",
    logit_scale: float = 1.0,
    temperature: float = 1.0,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    weight: Tensor | None = None,
    token_weights: Tensor | None = None,
    num_items_in_batch: int | Tensor | None = None,
    return_entropy: bool = False,
    return_argmax: bool = False,
    return_stats: bool = False,
    filter_seed: int = 0,
    state: object = None,
) -> Tensor | LinearCrossEntropyOutput:
    """`gemma_ext.linear_cross_entropy` with the rows of the classifier spread over a group.

    Every rank passes the same `e`, `targets` and options, and its own rows of the classifier; every
    rank gets the same loss, bit for bit. Communication: 12 to 20 bytes per token and rank forward,
    one [N, D] float32 sum backward.

    Args:
        e: [..., T, D] hidden states, the same on every rank (a `DTensor` must be `Replicate`).
        c_local: [V_local, D] rows of this rank, in rank order, of any number including none; or a
            `DTensor` with `Shard(0)` on a one-dimensional mesh.
        targets: [..., T] labels in [0, V), the same on every rank.
        bias: [V_local], or a `DTensor` with `Shard(0)`.
        group: ranks that hold the vocabulary; the mesh of `c_local`, else the default group.
        vocab_start, vocab_size: first column of this rank and V; found by asking the ranks when
            None.
        reduce_e_grad: sum dE over the group. False leaves each rank its own part, for callers that
            reduce it themselves (sequence parallelism).
        validate: agree on shard sizes and labels first and check the label range; one more
            all-gather of five integers and two host synchronisations. False needs `vocab_start` and
            `vocab_size` for a plain `c_local`, and makes the loss of a label outside [0, V) NaN.
        weight: [V] class weights of the whole vocabulary, on every rank.
        return_stats: what the gradient filter kept of this rank's columns.
        filter_seed: as in `gemma_ext.linear_cross_entropy`; ranks draw differently.
        state: ignored, goes with the next release.

    The remaining arguments and the returned value are those of `gemma_ext.linear_cross_entropy`.
    The gradient filter samples strips by their part of the whole vocabulary's probability; "auto"
    chooses the threshold of a shard by its own columns.

    Raises:
        TypeError, ValueError: an argument that does not fit; ranks that disagree about tokens or
            vocabulary.
        RuntimeError: torch.distributed is not initialised.

    Example:
        >>> head = distribute_tensor(lm_head.weight, mesh, [Shard(0)])
        >>> loss = vocab_parallel_linear_cross_entropy(hidden, head, labels, softcap=30.0)
    """
    head = Head(softcap, logit_scale, temperature, ignore_index)
    if state is not None:
        warn_ignored("state")
    method = Method(impl, filter_eps, filter_seed)
    terms = LossTerms(
        reduction=reduction,
        shift=shift,
        label_smoothing=label_smoothing,
        z_loss=z_loss,
        weight=local_replica("weight", weight),
        token_weights=local_replica("token_weights", token_weights),
        num_items_in_batch=num_items_in_batch,
    )
    wanted = Wanted(return_lse, return_entropy, return_argmax, return_stats)
    e, c, targets, bias, shard = _enter(
        e, c_local, targets, bias, group, vocab_start, vocab_size, validate, method
    )
    terms.check(targets, shard.vocab_size)
    tokens = weigh(e, targets, head, terms)
    if validate:
        check_labels(tokens.labels, shard.vocab_size, ignore_index, offset=tokens.steps, wait=True)
    smoothing = terms.smoothing(shard.vocab_size, tokens.coef)
    rows = vocab_parallel_rows(
        e.reshape(-1, e.shape[-1]),
        c,
        tokens.labels,
        bias,
        shard,
        head,
        method,
        class_weight=None if smoothing is None else smoothing[shard.start : shard.stop],
        want_entropy=wanted.entropy,
        want_argmax=wanted.argmax,
        want_stats=wanted.stats,
        want_moments=False,
        reduce_e_grad=reduce_e_grad,
    )
    return assemble(tokens, rows, smoothing, terms, wanted)


def vocab_parallel_linear_logprobs(
    e: Tensor,
    c_local: Tensor,
    targets: Tensor,
    *,
    bias: Tensor | None = None,
    group: dist.ProcessGroup | None = None,
    vocab_start: int | None = None,
    vocab_size: int | None = None,
    reduce_e_grad: bool = True,
    validate: bool = True,
    ignore_index: int = -100,
    softcap: float | None = None,
    shift: int | bool = 0,
    logit_scale: float = 1.0,
    temperature: float = 1.0,
    filter_eps: float | str | None = "auto",
    impl: str = "auto",
    filter_seed: int = 0,
    state: object = None,
    return_entropy: bool = True,
    return_moments: bool = False,
    return_top1: bool = False,
    kl: str | None = None,
    ref_logprobs: Tensor | None = None,
) -> tuple[Tensor, Tensor] | LinearLogprobsOutput:
    """`gemma_ext.linear_logprobs` with the rows of the classifier spread over a group.

    Arguments as in `vocab_parallel_linear_cross_entropy` and `gemma_ext.linear_logprobs`; the
    log-probabilities of a reference come from a call of their own, so that `kl` is "k1", "k2" or
    "k3".

    Returns:
        As `gemma_ext.linear_logprobs`, the same on every rank.
    """
    head = Head(softcap, logit_scale, temperature, ignore_index)
    if state is not None:
        warn_ignored("state")
    method = Method(impl, filter_eps, filter_seed)
    terms = LossTerms(reduction="none", shift=shift)
    if kl == "full":
        raise ValueError("expected kl to be None or one of k1, k2, k3, got 'full'")
    check_reference(kl, ref_logprobs=ref_logprobs)
    e, c, targets, bias, shard = _enter(
        e, c_local, targets, bias, group, vocab_start, vocab_size, validate, method
    )
    tokens = weigh(e, targets, head, terms)
    if validate:
        check_labels(tokens.labels, shard.vocab_size, ignore_index, offset=tokens.steps, wait=True)
    rows = vocab_parallel_rows(
        e.reshape(-1, e.shape[-1]),
        c,
        tokens.labels,
        bias,
        shard,
        head,
        method,
        class_weight=None,
        want_entropy=return_entropy,
        want_argmax=return_top1,
        want_stats=False,
        want_moments=return_moments,
        reduce_e_grad=reduce_e_grad,
    )
    out = fields_of(tokens, rows)
    if kl:
        ref_logprobs = given_logprobs(ref_logprobs, tokens, out.logprobs)
        estimate = estimate_kl(out.logprobs, ref_logprobs, kl)
        return out._replace(kl=estimate, ref_logprobs=ref_logprobs)
    plain = return_entropy and not (return_moments or return_top1)
    return (out.logprobs, out.entropy) if plain else out


def _enter(
    e: Tensor,
    c_local: Tensor,
    targets: Tensor,
    bias: Tensor | None,
    group: dist.ProcessGroup | None,
    vocab_start: int | None,
    vocab_size: int | None,
    validate: bool,
    method: Method,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None, VocabShard]:
    """Plain local tensors and this rank's columns, checked."""
    c, head_group, head_vocab = local_head(c_local)
    e, targets = local_replica("e", e), local_replica("targets", targets)
    bias = local_bias(bias)
    group = resolve_group(group, head_group)
    if head_vocab is not None:
        if vocab_size not in (None, head_vocab):
            raise ValueError(f"expected vocab_size {head_vocab} like c_local, got {vocab_size}")
        vocab_size = head_vocab
        start, _ = vocab_shard_range(head_vocab, dist.get_rank(group), dist.get_world_size(group))
        vocab_start = start if vocab_start is None else vocab_start
    if c.dim() == 2 and c.shape[0] == 0:  # a shard without columns is fine here, only here
        check_problem(e, c.new_empty(1, c.shape[1]), targets, None, method)
        check_vector("bias", bias, 0, e.device)
    else:
        check_problem(e, c, targets, bias, method)
    shard = resolve_shard(c.shape[0], targets, group, vocab_start, vocab_size, validate)
    return e, c, targets, bias, shard
