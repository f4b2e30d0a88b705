"""Edits measured where they are meant to act: on generated images and on answers."""
