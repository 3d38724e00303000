"""The bundled model: its text, its evaluation, and the demo that prunes it."""
