"""Checkpoints of other libraries with random weights, and their forwards in a few dense lines."""

import json

import torch
from safetensors.torch import load_file, save_file

N, D, F, K, M = 23, 11, 37, 5, 2
DICTIONARY_LEARNING = (
    "AutoEncoder",
    "AutoEncoderNew",
    "GatedAutoEncoder",
    "JumpReluAutoEncoder",
    "AutoEncoderTopK",
    "BatchTopKSAE",
    "MatryoshkaBatchTopKSAE",
)


def draw(generator, *shape, scale=1.0):
    return torch.randn(*shape, generator=generator) * scale


def close(found, expected):
    scale = float(expected.detach().abs().max()) + 1e-12
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=2e-5 * scale)


def top(p, k, by=None):
    """p where it is among the k best of its row, else 0."""
    chosen = (p if by is None else by).topk(k, dim=-1).indices
    return torch.zeros_like(p).scatter(-1, chosen, p.gather(-1, chosen))


def saelens(architecture, generator, **config):
    """Configuration and tensors."""
    d_out = 13 if "transcoder" in architecture else D
    tensors = {
        "W_enc": draw(generator, D, F),
        "W_dec": draw(generator, F, d_out),
        "b_dec": draw(generator, d_out),
    }
    if architecture == "gated":
        tensors |= {name: draw(generator, F, scale=0.5) for name in ("b_gate", "b_mag", "r_mag")}
    else:
        tensors["b_enc"] = draw(generator, F, scale=0.5)
    if "jumprelu" in architecture:
        tensors["threshold"] = draw(generator, F).abs()
    if "skip" in architecture:
        tensors["W_skip"] = draw(generator, d_out, D)
    if "transcoder" in architecture:
        config |= {"d_out": d_out, "apply_b_dec_to_input": False}
    if "topk" in architecture:
        config = {"k": K, "rescale_acts_by_decoder_norm": False} | config
    known = {
        "architecture": architecture,
        "d_in": D,
        "d_sae": F,
        "dtype": "float32",
        "device": "cpu",
        "apply_b_dec_to_input": True,
        "normalize_activations": "none",
        "reshape_activations": "none",
        "metadata": {
            "sae_lens_version": "6.54.12",
            "sae_lens_training_version": "6.54.12",
            "model_name": "pocket",
            "hook_name": "blocks.1.hook_resid_post",
        },
    }
    return known | config, tensors


def write_saelens(folder, config, tensors):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "cfg.json").write_text(json.dumps(config))
    save_file({k: v.contiguous() for k, v in tensors.items()}, folder / "sae_weights.safetensors")


def read_saelens(folder):
    return json.loads((folder / "cfg.json").read_text()), load_file(
        folder / "sae_weights.safetensors"
    )


def saelens_forward(config, t, x):
    """Latents (as the library gives them) and reconstruction."""
    mean = std = None
    if config["normalize_activations"] == "layer_norm":
        mean = x.mean(-1, keepdim=True)
        std = (x - mean).std(-1, keepdim=True)
        z = (x - mean) / (std + 1e-5)
    elif config["normalize_activations"] == "constant_norm_rescale":
        std = x.norm(dim=-1, keepdim=True) / x.shape[-1] ** 0.5
        mean, z = 0.0, x / std
    else:
        z = x
    if config["apply_b_dec_to_input"]:
        z = z - t["b_dec"]
    architecture, norm = config["architecture"], t["W_dec"].norm(dim=-1)
    if architecture == "gated":
        q = z @ t["W_enc"]
        magnitude = q * t["r_mag"].exp() + t["b_mag"]
        f = (q + t["b_gate"] > 0) * magnitude.relu()
    else:
        p = z @ t["W_enc"] + t["b_enc"]
        if config.get("rescale_acts_by_decoder_norm"):
            p = p * norm
        if "jumprelu" in architecture:
            f = p.relu() * (p > t["threshold"])
        elif architecture == "topk":
            f = top(p, config["k"]).relu()
        elif architecture == "abstopk":
            f = top(p, config["k"], p.abs())
        else:
            f = p.relu()
    back = f / norm if config.get("rescale_acts_by_decoder_norm") else f
    out = back @ t["W_dec"] + t["b_dec"]
    if "W_skip" in t:
        out = out + x @ t["W_skip"].T
    return f, out if mean is None else out * std + mean


def dictionary_learning(kind, generator):
    """Configuration and state dict."""
    trainer = {"dict_class": kind, "activation_dim": D, "dict_size": F, "lm_name": "pocket"}
    encoder, decoder = draw(generator, F, D), draw(generator, D, F)
    bias, out = draw(generator, F, scale=0.5), draw(generator, D)
    linear = {"encoder.weight": encoder, "decoder.weight": decoder, "encoder.bias": bias}
    plain = {"W_enc": encoder.T.contiguous(), "W_dec": decoder.T.contiguous(), "b_enc": bias}
    batch = {"threshold": torch.tensor(0.7), "k": torch.tensor(K, dtype=torch.int)}
    if "K" in kind:
        trainer["k"] = K
    groups = {"group_sizes": torch.tensor([10, F - 10])}
    state = {
        "AutoEncoder": linear | {"bias": out},
        "AutoEncoderNew": linear | {"decoder.bias": out},
        "GatedAutoEncoder": {
            "encoder.weight": encoder,
            "decoder.weight": decoder,
            "decoder_bias": out,
            "r_mag": draw(generator, F, scale=0.3),
            "gate_bias": bias,
            "mag_bias": draw(generator, F, scale=0.3),
        },
        "JumpReluAutoEncoder": plain | {"b_dec": out, "threshold": draw(generator, F).abs()},
        "AutoEncoderTopK": linear | {"b_dec": out} | batch,
        "BatchTopKSAE": linear | {"b_dec": out} | batch,
        "MatryoshkaBatchTopKSAE": plain | {"b_dec": out} | batch | groups,
    }[kind]
    return {"trainer": trainer, "buffer": {}}, state


def write_dictionary_learning(folder, config, state):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    torch.save(state, folder / "ae.pt")


def dictionary_learning_forward(config, s, x):
    kind = config["trainer"]["dict_class"]
    encoder = s["encoder.weight"].T if "encoder.weight" in s else s["W_enc"]
    decoder = s["decoder.weight"].T if "decoder.weight" in s else s["W_dec"]
    out = s[
        {"AutoEncoder": "bias", "AutoEncoderNew": "decoder.bias"}.get(
            kind, "decoder_bias" if kind == "GatedAutoEncoder" else "b_dec"
        )
    ]
    z = x if kind in ("AutoEncoderNew", "JumpReluAutoEncoder") else x - out
    q = z @ encoder
    if kind == "GatedAutoEncoder":
        f = (q + s["gate_bias"] > 0) * (s["r_mag"].exp() * q + s["mag_bias"]).relu()
        return f, f @ decoder + out
    p = q + (s["encoder.bias"] if "encoder.bias" in s else s["b_enc"])
    f = p.relu()
    if kind == "AutoEncoderTopK":
        f = top(f, int(s["k"]))
    elif "threshold" in s:
        f = f * (p > s["threshold"])
    return f, f @ decoder + out


def sparsify(generator, *, activation="topk", transcode=False, skip=False):
    config = {
        "activation": activation,
        "expansion_factor": 4,
        "normalize_decoder": True,
        "num_latents": 40,
        "k": K,
        "multi_topk": False,
        "skip_connection": skip,
        "transcode": transcode,
        "d_in": D,
    }
    state = {
        "encoder.weight": draw(generator, 40, D),
        "encoder.bias": draw(generator, 40, scale=0.5),
        "W_dec": draw(generator, 40, D),
        "b_dec": draw(generator, D),
    }
    if skip:
        state["W_skip"] = draw(generator, D, D)
    return config, state


def write_sparsify(folder, config, state):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "cfg.json").write_text(json.dumps(config))
    save_file(state, folder / "sae.safetensors")


def sparsify_forward(config, s, x):
    z = x if config["transcode"] else x - s["b_dec"]
    p = (z @ s["encoder.weight"].T + s["encoder.bias"]).relu()
    if config["activation"] == "topk":
        f = top(p, config["k"])
    else:
        groups = p.unflatten(-1, (config["k"], -1))
        f = (groups * (groups == groups.amax(-1, keepdim=True))).flatten(-2)
    out = f @ s["W_dec"] + s["b_dec"]
    return f, out + x @ s["W_skip"].T if "W_skip" in s else out


def openai(generator, kind="TopK", after="ReLU"):
    state = {
        "pre_bias": draw(generator, D),
        "latent_bias": draw(generator, F, scale=0.5),
        "encoder.weight": draw(generator, F, D),
        "decoder.weight": draw(generator, D, F),
        "stats_last_nonzero": torch.zeros(F, dtype=torch.long),
        "activation": kind,
    }
    if kind == "TopK":
        state["activation_state_dict"] = {"k": K, "postact_fn": after}
    return state


def openai_forward(s, x):
    mean, std = 0.0, 1.0
    if s["activation"] == "TopK":
        mean = x.mean(-1, keepdim=True)
        std = (x - mean).std(-1, keepdim=True)
        x = (x - mean) / (std + 1e-5)
    p = (x - s["pre_bias"]) @ s["encoder.weight"].T + s["latent_bias"]
    if s["activation"] == "TopK":
        f = top(p, s["activation_state_dict"]["k"])
        f = f.relu() if s["activation_state_dict"]["postact_fn"] == "ReLU" else f
    else:
        f = p.relu()
    return f, (f @ s["decoder.weight"].T + s["pre_bias"]) * std + mean


def crosscoder(generator, *, norm=1, k=K, normaliser=False):
    state = {
        "encoder.weight": draw(generator, M, D, F),
        "encoder.bias": draw(generator, F, scale=0.5),
        "decoder.weight": draw(generator, M, F, D),
        "decoder.bias": draw(generator, M, D),
        "code_normalization_id": torch.tensor(norm),
        "activation_mean": torch.full((M, D), torch.nan),
        "activation_std": torch.full((M, D), torch.nan),
        "activation_global_scale": torch.ones(M),
        "target_rms": torch.tensor(1.0),
    }
    if k is not None:
        state |= {"k": torch.tensor(k, dtype=torch.int), "threshold": torch.tensor(9.0)}
    if normaliser:
        state["activation_mean"] = draw(generator, M, D)
        state["activation_std"] = draw(generator, M, D).abs() + 0.1
        variance = state["activation_std"].square().sum(-1)
        state["activation_global_scale"] = 1.0 / (variance + 1e-8).sqrt()
    return state


def crosscoder_forward(s, x):
    scale, mean = s["activation_global_scale"][:, None], s["activation_mean"]
    normalises = not mean.isnan().any()
    z = (x - mean) * scale if normalises else x
    f = (torch.einsum("nmd,mdf->nf", z, s["encoder.weight"]) + s["encoder.bias"]).relu()
    rows = s["decoder.weight"]
    total, joint = rows.norm(dim=2).sum(0), rows.norm(dim=(0, 2))
    norm = {1: total, 2: joint, 3: joint + 0.1 * total, 4: torch.ones(F)}[
        int(s["code_normalization_id"])
    ]
    if "k" in s:
        f = f * (f * norm > s["threshold"])
    out = torch.einsum("nf,mfd->nmd", f, rows) + s["decoder.bias"]
    return f, out / (scale + 1e-8) + mean if normalises else out
