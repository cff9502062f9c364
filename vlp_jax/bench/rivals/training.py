"""A train step of PyTorch as its users write it: AdamW, autocast, torch.compile."""

from collections.abc import Callable, Mapping
import json
import os
import sys
import time
from typing import Any

import torch

from vlp_jax.bench import timing


def main(
  model: Callable[[Mapping[str, Any]], torch.nn.Module],
  batch: Callable[[Mapping[str, Any]], dict[str, torch.Tensor]],
  **about: str,
) -> None:
  """Serves steps of `model(sizes)`, a module that maps `batch(sizes)` to its loss.

  The sizes come as JSON, the first argument. about: to be told beside torch's version.
  """
  sizes = json.loads(sys.argv[1])
  torch.manual_seed(0)
  device = sizes["device"]
  if device == "cpu":
    torch.set_num_threads(len(os.sched_getaffinity(0)))
  # What a float32 product may round on a GPU, as jax's default does.
  torch.set_float32_matmul_precision("high")
  module = model(sizes).to(device).train()
  data = {key: value.to(device) for key, value in batch(sizes).items()}
  # fused: the fastest of its three implementations, on CPUs too.
  adamw = torch.optim.AdamW(module.parameters(), lr=1e-4, weight_decay=0.2, fused=True)
  call = torch.compile(module) if sizes["compiled"] else module
  half = sizes["dtype"] == "bfloat16"

  def step():
    adamw.zero_grad(set_to_none=True)
    with torch.autocast(device, torch.bfloat16, enabled=half):
      loss = call(**data)
    loss.backward()
    adamw.step()

  def steps():
    for _ in range(sizes["steps"]):
      step()
    if device == "cuda":
      torch.cuda.synchronize()

  start = time.perf_counter()
  step()
  if device == "cuda":
    torch.cuda.synchronize()
  timing.serve(
    {
      "torch": torch.__version__,
      "parameters": sum(p.numel() for p in module.parameters()),
      "compiled": sizes["compiled"],
      "first_step_seconds": time.perf_counter() - start,
      **about,
    },
    timing.here(steps, times=sizes["steps"]),
  )


def pairs(sizes: Mapping[str, Any]) -> dict[str, torch.Tensor]:
  """image float32 [B, 3, R, R] and text int64 [B, L]: noise, and any words."""
  side, rows = sizes["res"], sizes["batch_size"]
  text = torch.randint(5, sizes["vocab"], (rows, sizes["length"]))
  return {"image": torch.randn(rows, 3, side, side), "text": text}


def contrast(
  zimg: torch.Tensor, ztxt: torch.Tensor, scale: torch.Tensor
) -> torch.Tensor:
  """CLIP's loss of two unit-norm [B, E]."""
  logits = scale * zimg @ ztxt.T
  target = torch.arange(len(logits), device=logits.device)
  cross_entropy = torch.nn.functional.cross_entropy
  return (cross_entropy(logits, target) + cross_entropy(logits.T, target)) / 2


def negatives(similarity: torch.Tensor) -> torch.Tensor:
  """int64 [B]: a column of each row but its own, by the softmax of similarity."""
  logits = similarity.detach().float()
  own = torch.eye(len(logits), dtype=torch.bool, device=logits.device)
  weights = logits.masked_fill(own, float("-inf")).softmax(dim=1)
  return torch.multinomial(weights, 1)[:, 0]


def masked(text: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
  """(ids of which 15 % are replaced, labels, -100 elsewhere)."""
  chosen = torch.rand(text.shape, device=text.device) < 0.15
  return text.masked_fill(chosen, 4), text.masked_fill(~chosen, -100)
