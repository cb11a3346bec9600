"""`python -m iteris_sd`."""

from iteris_sd.cli import app

app(prog_name="python -m iteris_sd")
