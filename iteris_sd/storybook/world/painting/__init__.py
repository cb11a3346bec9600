"""How the storybook world is painted: brush, things, places and light."""
