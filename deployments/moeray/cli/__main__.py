"""`python -m moeray.cli` is the `moeray` command."""

import sys

from moeray.cli.commands import main

sys.exit(main())
