"""The peer of `benchmarks.accelerator`: a GPT-2 train step in PyTorch, as fast as it goes by its
documentation: torch.compile, flash attention, bfloat16 autocast, fused AdamW.

    python -m benchmarks.torch_step --batch_size=64 --length=1024

Runs under the peer's Python (torch alone, nothing of ours). The same architecture, batch, length and
optimizer as our side: tied head, vocabulary padded to 50,304, float32 masters, gradient clipping.
The last line of its output is JSON.
"""

import argparse
import json
import math
import statistics
import time

import torch
import torch.nn.functional as F
from torch import nn


class Block(nn.Module):
    """Pre-LayerNorm attention and MLP."""

    def __init__(self, width: int, heads: int, layers: int):
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
        for part in (self.qkv, self.up, self.out, self.down):
            std = 0.02 / math.sqrt(2 * layers) if part in (self.out, self.down) else 0.02
            nn.init.normal_(part.weight, std=std)
            nn.init.zeros_(part.bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        B, L, D = x.shape
        q, k, v = self.qkv(self.norm1(x)).split(D, dim=2)
        q, k, v = (y.view(B, L, self.heads, D // self.heads).transpose(1, 2) for y in (q, k, v))
        o = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(o.transpose(1, 2).reshape(B, L, D))
        return x + self.down(F.gelu(self.up(self.norm2(x)), approximate="tanh"))


class GPT2(nn.Module):
    """Tokens [B, L] and targets [B, L] -> mean cross-entropy."""

    def __init__(self, vocabulary: int, length: int, width: int, heads: int, layers: int):
        super().__init__()
        self.tokens, self.positions = nn.Embedding(vocabulary, width), nn.Embedding(length, width)
        nn.init.normal_(self.tokens.weight, std=0.02)
        nn.init.normal_(self.positions.weight, std=0.02)
        self.blocks = nn.ModuleList(Block(width, heads, layers) for _ in range(layers))
        self.norm = nn.LayerNorm(width)

    def forward(self, tokens: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        x = self.tokens(tokens) + self.positions.weight[: tokens.shape[1]]
        for block in self.blocks:
            x = block(x)
        logits = F.linear(self.norm(x), self.tokens.weight)
        return F.cross_entropy(logits.flatten(0, 1), targets.flatten())


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--batch_size", type=int, required=True)
    parser.add_argument("--length", type=int, default=1024)
    parser.add_argument("--toy", action="store_true")
    args = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(0)
    torch.set_float32_matmul_precision("high")
    sizes = (256, args.length, 32, 4, 2) if args.toy else (50_304, args.length, 768, 12, 12)
    model = GPT2(*sizes).to(device)
    matrices = [p for p in model.parameters() if p.dim() > 1]
    vectors = [p for p in model.parameters() if p.dim() <= 1]
    optimizer = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}],
        lr=6e-4,
        betas=(0.9, 0.95),
        fused=device == "cuda",
    )
    compiled = model if args.toy else torch.compile(model)
    shape = (args.batch_size, args.length)
    tokens, targets = (torch.randint(0, sizes[0], shape, device=device) for _ in range(2))

    def step() -> torch.Tensor:
        with torch.autocast(device, dtype=torch.bfloat16):
            loss = compiled(tokens, targets)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss

    def synchronize() -> None:
        if device == "cuda":
            torch.cuda.synchronize()

    start = time.perf_counter()
    step()
    synchronize()
    compile_seconds = time.perf_counter() - start
    for _ in range(3):
        step()
    synchronize()
    groups, group = (3, 2) if args.toy else (6, 4)
    speeds = []
    for _ in range(groups):
        start = time.perf_counter()
        for _ in range(group):
            loss = step()
        synchronize()
        speeds.append(group * args.batch_size * args.length / (time.perf_counter() - start))
    if not math.isfinite(loss.item()):
        raise RuntimeError(f"loss {loss.item()}: its speed says nothing")
    result = {
        "torch": torch.__version__,
        "device": torch.cuda.get_device_name() if device == "cuda" else "cpu",
        "rows": args.batch_size,
        "length": args.length,
        "compile_seconds": compile_seconds,
        "tokens_per_second": {
            "median": statistics.median(speeds),
            "range": [min(speeds), max(speeds)],
            "count": len(speeds),
        },
        "hbm_peak_bytes": torch.cuda.max_memory_allocated() if device == "cuda" else None,
        "loss": loss.item(),
    }
    print(json.dumps(result), flush=True)


if __name__ == "__main__":
    main()
