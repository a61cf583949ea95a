"""What is measured on generated text and on harmless text, with intervals."""
