"""Speed and memory against other ways of doing the same; run by hand, never by a test that asserts a time."""
