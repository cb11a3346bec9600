"""What is heavy to import comes once, and nobody waits for it twice."""

from __future__ import annotations

import threading

from iteris_sd.ui import heavy


def test_while_a_base_model_loads_nobody_waits_for_what_is_imported() -> None:
    heavy.bring_in()
    other = threading.Thread(target=heavy.bring_in, daemon=True)
    with heavy.IMPORTING:  # as long as a base model loads
        other.start()
        other.join(10)
        assert not other.is_alive()
