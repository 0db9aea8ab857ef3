"""Routes below `/pte/v1/records` hand out what requests with `pte_record` were answered."""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter, HTTPException, Query, Request
from fastapi.responses import Response

from pte_vllm.server.service import service

router = APIRouter()

Last = Annotated[int | None, Query(ge=0, lt=2**63)]


@router.get("/records/{name}")
async def get_records(name: str, request: Request) -> Response:
    """Tell the records of a name as their answers ended, and the number of the last."""
    last, lines = service(request).recorder.store.get(name)
    if not lines:
        raise _unknown(name)
    body = b'{"last":%d,"records":[%b]}' % (last, b",".join(lines))
    return Response(body, media_type="application/json")


@router.delete("/records/{name}")
async def delete_records(name: str, request: Request, last: Last = None) -> dict[str, int | str]:
    """Forget the records of a name; with `last` those that ended later stay."""
    count = service(request).recorder.store.drop(name, last)
    if not count:
        raise _unknown(name)
    return {"deleted": name, "records": count}


def _unknown(name: str) -> HTTPException:
    return HTTPException(
        404,
        f"no record is called {name}: no request with pte_record {name} has ended, or its records "
        "were dropped, or newer ones took their room",
    )
