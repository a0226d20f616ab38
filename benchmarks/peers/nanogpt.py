"""Plain PyTorch GPT-2: standard modules, scaled_dot_product_attention, fused AdamW, autocast."""

import math
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import nn


class Block(nn.Module):
    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.ln_1, self.ln_2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.c_attn, self.attn_proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.c_fc, self.mlp_proj = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x):
        B, L, D = x.shape
        apart = lambda y: y.view(B, L, self.heads, D // self.heads).transpose(1, 2)
        q, k, v = map(apart, self.c_attn(self.ln_1(x)).split(D, dim=2))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.attn_proj(y.transpose(1, 2).reshape(B, L, D))
        return x + self.mlp_proj(F.gelu(self.c_fc(self.ln_2(x)), approximate="tanh"))


class GPT(nn.Module):
    def __init__(self, vocab: int, length: int, layers: int, width: int, heads: int):
        super().__init__()
        self.wte, self.wpe = nn.Embedding(vocab, width), nn.Embedding(length, width)
        self.h = nn.ModuleList(Block(width, heads) for _ in range(layers))
        self.ln_f = nn.LayerNorm(width)

    def forward(self, tokens, targets):
        x = self.wte(tokens) + self.wpe(torch.arange(tokens.shape[1]))
        for block in self.h:
            x = block(x)
        logits = F.linear(self.ln_f(x), self.wte.weight)
        return F.cross_entropy(logits.view(-1, logits.shape[-1]), targets.reshape(-1))


def read_gpt2(folder: str, vocab: int, length: int, layers: int, width: int, heads: int) -> GPT:
    model = GPT(vocab, length, layers, width, heads)
    found = {}
    for name, value in load_file(Path(folder, "model.safetensors")).items():
        name = name.removeprefix("transformer.").replace("attn.c_proj", "attn_proj").replace("mlp.c_proj", "mlp_proj")
        name = name.replace("attn.c_attn", "c_attn").replace("mlp.c_fc", "c_fc")
        matrix = name.endswith("weight") and any(part in name for part in ("c_attn", "c_fc", "proj"))
        found[name] = value.T.contiguous() if matrix else value
    model.load_state_dict(found)
    return model


def make_step(loss_of, model, optimizer_options, precision: str, batches):
    """`loss_of(model, tokens, targets)`; a turn is a whole update and gives its loss."""
    decay = [p for p in model.parameters() if p.dim() >= 2]
    rest = [p for p in model.parameters() if p.dim() < 2]
    rate, b1, b2, eps, weight_decay, clip = optimizer_options
    groups = [{"params": decay, "weight_decay": weight_decay}, {"params": rest, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=rate, betas=(b1, b2), eps=eps, fused=True)

    def turn() -> float:
        tokens, targets = map(torch.from_numpy, next(batches))
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bfloat16"):
            loss = loss_of(model, tokens, targets)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), clip)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        value = loss.item()
        assert math.isfinite(value)
        return value

    return turn
