"""`serve-vae`: models behind gRPC, and behind HTTP.

In the order in which a request meets them: `listening`, `security` (who may call, and how it is encrypted), `gate` and
`http` (the two doors), `admission` (around every call: request id, allowance, errors, measurements), `sampling`,
`inference` and `admin` (gRPC's three services), `requests` (what may be asked), `models` (what is served), `work` and
`batcher` (what waits, and whose turn it is), the engine, `encoders`, `wire` (the reply, its pixels copied once).
`folder` loads models, `settings` is the whole configuration,
`telemetry` what is measured, `memory` keeps a long life from costing more and more of it, `refusal` is how a call is
turned down, and `app` puts it all together.
"""
