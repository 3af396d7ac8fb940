"""HTTP over the engine and the registry: one router per noun, put together in `app.main`."""
