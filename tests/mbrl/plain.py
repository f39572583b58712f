"""The networks of the latent world model again: float64 numpy, written from the publication.

Nothing here calls the library; only the names of its parameters are shared.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

Floats = np.ndarray[Any, np.dtype[np.float64]]


def as_float64(tree: Any) -> Any:
    return jax.tree.map(lambda x: np.asarray(x, np.float64), tree)


def random_weights(shapes: Any, seed: int, gain: float = 1.0) -> Any:
    """Fill a pytree of shapes: kernels at their fan-in's scale, nothing at zero or at one."""
    rng = np.random.default_rng(seed)

    def fill(path: Any, leaf: Any) -> Any:
        name = jax.tree_util.keystr(path)
        x = rng.normal(size=leaf.shape)
        if "scale" in name:
            x = 1.0 + 0.2 * x
        elif "bias" in name:
            x = 0.2 * x
        else:
            fan_in = np.prod(leaf.shape[:-1]) if len(leaf.shape) == 4 else leaf.shape[-2]
            x = gain * x / np.sqrt(fan_in)
        return jnp.asarray(x, leaf.dtype)

    return jax.tree_util.tree_map_with_path(fill, shapes)


def sigmoid(x: Any) -> Any:
    return 1.0 / (1.0 + np.exp(-x))


def silu(x: Any) -> Any:
    return x * sigmoid(x)


def softplus(x: Any) -> Any:
    return np.logaddexp(0.0, x)


def symlog(x: Any) -> Any:
    return np.sign(x) * np.log(1.0 + np.abs(x))


def softmax(x: Any) -> Any:
    e = np.exp(x - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def log_softmax(x: Any) -> Any:
    x = x - x.max(-1, keepdims=True)
    return x - np.log(np.exp(x).sum(-1, keepdims=True))


def unimix(logits: Any, share: float) -> Any:
    """Return probabilities [..., C]."""
    return (1.0 - share) * softmax(logits) + share / logits.shape[-1]


def rms(x: Any, scale: Any) -> Any:
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-4) * scale


def dense(p: Any, x: Any) -> Any:
    return x @ p["kernel"] + p["bias"]


def mlp(p: Any, x: Any) -> Any:
    """Apply hidden layers (dense, norm, silu), and the linear layer after them if there is one."""
    num = len([name for name in p if name.startswith("RMSNorm")])
    for i in range(num):
        x = silu(rms(dense(p[f"Dense_{i}"], x), p[f"RMSNorm_{i}"]["scale"]))
    return dense(p[f"Dense_{num}"], x) if f"Dense_{num}" in p else x


def gru(p: Any, state: Any, latent: Any, action: Any) -> Any:
    """Move [B, D] on: the blocks see a slice of the state and all three inputs."""
    blocks, width = p["recurrent"].shape[:2]
    action = action / np.maximum(1.0, np.abs(action))
    inputs = [mlp(p["state_in"], state), mlp(p["latent_in"], latent), mlp(p["action_in"], action)]
    hidden = np.zeros_like(state)
    for g in range(blocks):
        mine = slice(g * width, (g + 1) * width)
        kernel = np.concatenate([p["recurrent"][g], *p["shared"][:, :, mine]])
        hidden[:, mine] = np.concatenate([state[:, mine], *inputs], -1) @ kernel
    hidden = silu(rms(hidden + p["bias"], p["norm"]["scale"]))
    new = np.zeros_like(state)
    for g in range(blocks):
        mine = slice(g * width, (g + 1) * width)
        gates = hidden[:, mine] @ p["gates"][g]
        reset, candidate, update = (
            gates[:, i * width : (i + 1) * width] + p["gates_bias"][i, mine] for i in range(3)
        )
        candidate = np.tanh(sigmoid(reset) * candidate)
        update = sigmoid(update - 1.0)
        new[:, mine] = update * candidate + (1.0 - update) * state[:, mine]
    return new


def posterior(p: Any, deter: Any, tokens: Any) -> Any:
    x = np.concatenate([tokens, deter], -1) @ np.concatenate([p["from_tokens"], p["from_deter"]])
    return dense(p["out"], silu(rms(x + p["bias"], p["norm"]["scale"])))


def conv(p: Any, image: Any) -> Any:
    """Convolve [B, H, W, C] with a 5 x 5 kernel at stride 1, zeros beyond the edges."""
    _, height, width, _ = image.shape
    padded = np.pad(image, ((0, 0), (2, 2), (2, 2), (0, 0)))
    out = np.zeros((*image.shape[:3], p["kernel"].shape[-1])) + p["bias"]
    for i in range(5):
        for j in range(5):
            out += padded[:, i : i + height, j : j + width] @ p["kernel"][i, j]
    return out


def halve(image: Any) -> Any:
    """Take the maximum over windows of 2 x 2, at an odd edge over what there is."""
    rows, columns = range(0, image.shape[1], 2), range(0, image.shape[2], 2)
    windows = [[image[:, i : i + 2, j : j + 2].max((1, 2)) for j in columns] for i in rows]
    return np.stack([np.stack(row, 1) for row in windows], 1)


def conv_encoder(p: Any, image: Any) -> Any:
    """Encode images [B, H, W, C] that are centred around 0."""
    for i in range(len(p) // 2):
        image = silu(rms(halve(conv(p[f"Conv_{i}"], image)), p[f"RMSNorm_{i}"]["scale"]))
    return image.reshape(image.shape[0], -1)


def conv_decoder(p: Any, sizes: Any, deter: Any, stoch: Any) -> Any:
    """Decode to images in (0, 1); `sizes` lists (H, W) from the smallest map to the image."""
    (height, width), batch = sizes[0], deter.shape[0]
    kernel = p["BlockDense_0"]["kernel"]
    groups, inner, _ = kernel.shape
    bias = p["BlockDense_0"]["bias"].reshape(groups, -1)
    parts = []
    for g in range(groups):
        part = deter[:, g * inner : (g + 1) * inner] @ kernel[g] + bias[g]
        parts.append(part.reshape(batch, height, width, -1))
    x = np.concatenate(parts, -1)
    # Flax names the outer of two nested layers first.
    y = dense(p["Dense_0"], silu(rms(dense(p["Dense_1"], stoch), p["RMSNorm_0"]["scale"])))
    x = silu(rms(x + y.reshape(x.shape), p["RMSNorm_1"]["scale"]))
    last = len(sizes) - 2
    for i, size in enumerate(sizes[1:]):
        x = conv(p[f"Conv_{i}"], x.repeat(2, 1).repeat(2, 2))[:, : size[0], : size[1]]
        x = sigmoid(x) if i == last else silu(rms(x, p[f"RMSNorm_{i + 2}"]["scale"]))
    return x


def bins() -> Any:
    half = -np.expm1(-np.linspace(-20.0, 0.0, 128))
    return np.concatenate([half[:-1], [0.0], -half[:-1][::-1]])


def two_hot(x: float) -> Any:
    """Spread one number over the two bins around it."""
    centres, out = bins(), np.zeros(255)
    x = min(max(x, centres[0]), centres[-1])
    low = max(k for k in range(254) if centres[k] <= x)
    share = (x - centres[low]) / (centres[low + 1] - centres[low])
    out[low], out[low + 1] = 1.0 - share, share
    return out


def two_hot_mean(logits: Any) -> Any:
    return softmax(logits) @ bins()


def two_hot_nll(logits: Any, target: Any) -> Any:
    """Return the cross-entropies [...] of logits [..., 255] and targets [...]."""
    flat = log_softmax(logits).reshape(-1, 255)
    found = [-two_hot(x) @ row for x, row in zip(np.ravel(target), flat, strict=True)]
    return np.array(found).reshape(np.shape(target))
