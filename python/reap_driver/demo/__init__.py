"""The bundled model: its text, its training, its evaluation, and the demo that prunes it."""
