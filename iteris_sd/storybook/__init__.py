"""Storybook: the small built-in text-to-image model, the world it draws and how it was trained."""
