"""python -m vlp_jax COMMAND …"""

from vlp_jax import cli

if __name__ == "__main__":
  cli.main()
