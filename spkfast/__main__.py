"""Runs the command line: ``python -m spkfast``."""

import sys

from spkfast.cli.main import main

sys.exit(main())
