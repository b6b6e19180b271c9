"""A tiny BERT with random weights, whose vocabulary is made of given texts: for tests and smokes without weights.

It has learned nothing; yet texts that share words lie nearer to each other than texts that share none.
"""

from collections.abc import Sequence

import jax

from fedjax_rec.text.encoder import EncoderConfig, TextEncoder
from fedjax_rec.text.word_piece import WordPiece, words

SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]")


def random_encoder(
    texts: Sequence[str],
    *,
    seed: int,
    hidden_size: int = 32,
    num_layers: int = 2,
    num_heads: int = 2,
    intermediate_size: int = 64,
    max_tokens: int = 32,
    pooling: str = "mean",
) -> TextEncoder:
    """An encoder that knows the words of some texts.

    Args:
      texts: whose words are the vocabulary.
      seed: of the weights.
      hidden_size: length of a vector; a multiple of ``num_heads``.
      num_layers: blocks.
      num_heads: of each block.
      intermediate_size: width of each block's inner layer.
      max_tokens: of a text that count.
      pooling: "mean" or "cls".

    Raises:
      ValueError: if the heads do not divide the hidden size.
    """
    if hidden_size % num_heads:
        raise ValueError(f"hidden_size must be a multiple of num_heads; got {hidden_size} and {num_heads}.")
    pieces = (*SPECIAL, *sorted({word for text in texts for word in words(text)}))
    tokenizer = WordPiece({piece: row for row, piece in enumerate(pieces)})
    config = EncoderConfig(num_heads=num_heads, pooling=pooling, max_tokens=max_tokens)
    params = random_params(
        jax.random.key(seed),
        vocabulary_size=len(pieces),
        hidden_size=hidden_size,
        num_layers=num_layers,
        intermediate_size=intermediate_size,
        max_tokens=max_tokens,
    )
    return TextEncoder(config, params, tokenizer)


def random_params(
    key: jax.Array,
    *,
    vocabulary_size: int,
    hidden_size: int,
    num_layers: int,
    intermediate_size: int,
    max_tokens: int,
) -> dict[str, dict[str, jax.Array]]:
    """Normal weights in the shapes of `TextEncoder`: kernels keep a vector's length, norms are near the identity."""
    d = hidden_size
    kernels = {name: (num_layers, d, d) for name in ("query", "key", "value", "attention_out")}
    kernels |= {"up": (num_layers, d, intermediate_size), "down": (num_layers, intermediate_size, d)}
    embeddings = {"word": (vocabulary_size, d), "position": (max_tokens, d), "token_type": (2, d)}
    keys = iter(jax.random.split(key, len(embeddings) + 2 + 2 * len(kernels) + 4))

    def normal(shape, stddev):
        return stddev * jax.random.normal(next(keys), shape)

    def norm(name, shape):
        return {f"{name}.scale": 1 + normal(shape, 0.1), f"{name}.bias": normal(shape, 0.1)}

    layers = {}
    for name, shape in kernels.items():
        layers[f"{name}.kernel"] = normal(shape, shape[1] ** -0.5)
        layers[f"{name}.bias"] = normal((num_layers, shape[2]), 0.02)
    layers |= norm("attention_norm", (num_layers, d)) | norm("norm", (num_layers, d))
    table = {name: normal(shape, 1.0 if name == "word" else 0.1) for name, shape in embeddings.items()}
    return {"embeddings": table | norm("norm", (d,)), "layers": layers}
