"""A run without a model: processes that add a number, again and again.

ROUNDS: how many; MISTAKE: which process makes one (or all), in the second round.
"""

import os
import sys
import time

import jax
from jax.experimental import multihost_utils
import numpy as np

from vlp_jax import cli
from vlp_jax.training import cluster
from vlp_jax.training import distributed


def main():
  with distributed.joined(), cli.user_errors():
    me = jax.process_index()
    for done in range(int(os.environ["ROUNDS"])):
      got = multihost_utils.process_allgather(np.int32(me))
      assert got.tolist() == list(range(jax.process_count()))
      print("round", done, flush=True)
      if done and os.environ.get("MISTAKE") in (str(me), "all"):
        cluster.find({"VLP_JAX_COORDINATOR": "nowhere"})
      time.sleep(0.05)
  sys.exit(0)


if __name__ == "__main__":
  main()
