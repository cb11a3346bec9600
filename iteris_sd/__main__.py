"""`python -m iteris_sd`."""

import io
import sys

from iteris_sd.cli import app

for stream in (sys.stdout, sys.stderr):
    if isinstance(stream, io.TextIOWrapper):
        stream.reconfigure(errors="replace")  # where output goes to a file, Windows has no λ
app(prog_name="python -m iteris_sd")
