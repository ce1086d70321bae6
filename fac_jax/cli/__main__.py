"""`python -m fac_jax.cli`: the same as `fac`."""

import sys

from fac_jax.cli import main

sys.exit(main())
