"""Text to ids and back: tokenizers of every format, chat templates, dialogues with loss weights."""
