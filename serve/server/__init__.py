"""`serve-vae`: models behind gRPC.

In the order in which a request meets them: `security` (who may call, and how it is encrypted), `gate` (around every
call: request id, allowance, errors, measurements), `sampling`, `inference` and `admin` (the three services), `requests`
(what may be asked), `models` (what is served), `work` and `batcher` (what waits, and whose turn it is), the engine,
`encoding`, `wire` (the reply, its pixels copied once). `folder` loads models, `settings` is the whole configuration,
`telemetry` what is measured, `memory` keeps a long life from costing more and more of it, `refusal` is how a call is
turned down, and `app` puts it all together.
"""
