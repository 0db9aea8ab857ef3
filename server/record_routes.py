"""Routes below `/pte/v1/records` hand out what requests with `pte_record` were answered."""

from __future__ import annotations

from fastapi import APIRouter, HTTPException, Request
from fastapi.responses import Response

from pte_vllm.server.service import service

router = APIRouter()


@router.get("/records/{name}")
async def get_records(name: str, request: Request, drop: bool = False) -> Response:
    """Tell the records of a name in the order in which their answers ended; `drop` forgets them."""
    store = service(request).recorder.store
    lines = store.take(name) if drop else store.get(name)
    if not lines:
        raise _unknown(name)
    return Response(b'{"records":[' + b",".join(lines) + b"]}", media_type="application/json")


@router.delete("/records/{name}")
async def delete_records(name: str, request: Request) -> dict[str, int | str]:
    """Forget the records of a name."""
    count = service(request).recorder.store.drop(name)
    if not count:
        raise _unknown(name)
    return {"deleted": name, "records": count}


def _unknown(name: str) -> HTTPException:
    return HTTPException(
        404,
        f"no record is called {name}: no request with pte_record {name} has ended, or its records "
        "were dropped, or newer ones took their room",
    )
