"""Plain PyTorch Llama: standard modules, scaled_dot_product_attention, weights in bf16."""

import torch
import torch.nn.functional as F
from torch import nn


class Block(nn.Module):
    def __init__(self, width: int, heads: int, kv_heads: int, head_dim: int, hidden: int):
        super().__init__()
        self.heads, self.kv_heads = heads, kv_heads
        self.attention_norm, self.mlp_norm = nn.RMSNorm(width, eps=1e-5), nn.RMSNorm(width, eps=1e-5)
        plain = lambda a, b: nn.Linear(a, b, bias=False)
        self.q, self.out = plain(width, heads * head_dim), plain(heads * head_dim, width)
        self.k, self.v = plain(width, kv_heads * head_dim), plain(width, kv_heads * head_dim)
        self.gate, self.up, self.down = plain(width, hidden), plain(width, hidden), plain(hidden, width)

    def forward(self, x, cos, sin):
        B, L, _ = x.shape
        h = self.attention_norm(x)
        apart = lambda y, n: y.view(B, L, n, -1).transpose(1, 2)
        q, k, v = apart(self.q(h), self.heads), apart(self.k(h), self.kv_heads), apart(self.v(h), self.kv_heads)
        y = F.scaled_dot_product_attention(turned(q, cos, sin), turned(k, cos, sin), v, is_causal=True, enable_gqa=True)
        x = x + self.out(y.transpose(1, 2).reshape(B, L, -1))
        h = self.mlp_norm(x)
        return x + self.down(F.silu(self.gate(h)) * self.up(h))


def turned(x, cos, sin):
    a, b = x.chunk(2, -1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], -1)


class Llama(nn.Module):
    def __init__(self, vocab, layers, width, heads, kv_heads, head_dim, hidden, theta, tied, recompute):
        super().__init__()
        self.embedding = nn.Embedding(vocab, width)
        self.blocks = nn.ModuleList(Block(width, heads, kv_heads, head_dim, hidden) for _ in range(layers))
        self.norm, self.head = nn.RMSNorm(width, eps=1e-5), nn.Linear(width, vocab, bias=False)
        if tied:
            self.head.weight = self.embedding.weight
        self.frequencies = theta ** -(torch.arange(0, head_dim, 2, dtype=torch.float64) / head_dim)
        self.recompute = recompute

    def forward(self, tokens, targets):
        from torch.utils.checkpoint import checkpoint

        angles = torch.outer(torch.arange(tokens.shape[1], dtype=torch.float64), self.frequencies)
        x = self.embedding(tokens)
        cos, sin = (f(angles).to(x) for f in (torch.cos, torch.sin))
        for block in self.blocks:
            x = checkpoint(block, x, cos, sin, use_reentrant=False) if self.recompute else block(x, cos, sin)
        logits = self.head(self.norm(x)).float()
        return F.cross_entropy(logits.view(-1, logits.shape[-1]), targets.reshape(-1))
