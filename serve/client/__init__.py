"""The Python client of `serve-vae`: a server's models, with the interface that an Engine has.

>>> with Client("127.0.0.1:8470") as client:
...     model = client.model("faces")
...     model.sample(seed=7, start=100, count=5)              # uint8 [5, height, width, channels]
...     for start, images in model.stream(seed=7, start=0, count=1_000_000):
...         ...

`AsyncClient` is the same for asyncio. Since a sample is the same picture whoever makes it, whatever fails on the way is
asked for again, and a stream that broke goes on where it stopped, even on another server. `Fleet` is a client of
several servers, which share a range.
"""

from serve.client.aio import AsyncClient, AsyncModel
from serve.client.fleet import Fleet, FleetModel
from serve.client.options import Options
from serve.client.sync import Client, RemoteModel

__all__ = ["AsyncClient", "AsyncModel", "Client", "Fleet", "FleetModel", "Options", "RemoteModel"]
