"""A FastAPI service: requests that come together are answered in one packed batch by an engine.

pip install fastapi uvicorn && uvicorn service:app --app-dir examples
curl --data-binary @photo.jpg http://localhost:8000/classify
"""

import asyncio
import io
from contextlib import asynccontextmanager

import torch
from fastapi import FastAPI, HTTPException, Request
from PIL import Image, UnidentifiedImageError

from revit_kernels import create_model
from revit_kernels.models.registry import SHIPPED

MOST_TOKENS = 4096  # of one packed batch
MODEL = create_model(str(SHIPPED)).eval()
ENGINE = MODEL.engine()  # weights packed once; many threads may call it
LABELS = MODEL.pretrained_cfg["label_names"]


async def answer(queue: asyncio.Queue) -> None:
    """Take what waits, up to a budget of tokens, and answer it in one call."""
    while True:
        waiting = [await queue.get()]
        while not queue.empty() and (len(waiting) + 1) * 50 <= MOST_TOKENS:
            waiting.append(queue.get_nowait())
        images, futures = zip(*waiting)
        try:
            logits = await asyncio.to_thread(ENGINE, list(images))
            for future, row in zip(futures, logits.float().softmax(-1)):
                future.cancelled() or future.set_result(row)
        except Exception as error:
            for future in futures:
                future.cancelled() or future.set_exception(error)


@asynccontextmanager
async def lifespan(app: FastAPI):
    app.state.queue = asyncio.Queue(maxsize=1024)
    worker = asyncio.create_task(answer(app.state.queue))
    yield
    worker.cancel()


app = FastAPI(lifespan=lifespan)


@app.post("/classify")
async def classify(request: Request) -> dict:
    try:
        picture = Image.open(io.BytesIO(await request.body())).convert("RGB")
    except (UnidentifiedImageError, OSError):
        raise HTTPException(422, "this is no image") from None
    future = asyncio.get_running_loop().create_future()
    await app.state.queue.put((picture, future))
    probabilities = await future
    best = torch.argmax(probabilities).item()
    return {"label": LABELS[best], "probability": round(probabilities[best].item(), 4)}
