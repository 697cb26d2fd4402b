"""What answers look like, for the OpenAPI document: made of netflow.shapes, checked by tests."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, Field, create_model

from netflow import shapes

_TYPES: dict[str, Any] = {
    "time": str, "int": int, "count": int, "real": float, "bool": bool, "text": str,
}  # fmt: skip


class Gap(BaseModel):
    """A span of time whose records may be missing, and why: docs/netflow.md."""

    node: str | None = Field(description="Whose; null: this node's.")
    since: str
    until: str
    what: str
    events: int = Field(description="Messages of the kernel that were lost.")
    estimate: int | None = Field(description="Records thought missing, where anything can be said.")
    note: str


class Head(BaseModel):
    """What an answer is about. Times are ISO 8601, UTC, to the nanosecond."""

    since: str
    until: str
    as_of: str = Field(description="Up to when what still goes on is counted.")
    gaps: list[Gap]


class Icmp(BaseModel):
    type: int
    code: int
    id: int


class Nat(BaseModel):
    src: str
    dst: str
    sport: int | None = None
    dport: int | None = None


class Side(BaseModel):
    xid: int | None = Field(description="0: the node, or not local. null: not for you to see.")
    slice: str | None
    packets: int
    bytes: int


class Record(BaseModel):
    """A record: docs/netflow.md has the fields' meanings."""

    node: str
    start: str
    end: str
    flow_start: str
    proto: str
    src: str
    dst: str
    sport: int | None = None
    dport: int | None = None
    icmp: Icmp | None = None
    nat: Nat | None
    originator: Side
    responder: Side
    reason: str
    tcp_state: str | None
    flow_id: int | None
    zone: int


def row(name: str, columns: tuple[str, ...]) -> type[BaseModel]:
    """The model of a row with these columns; any of them may be missing or null."""
    fields: dict[str, Any] = {
        column: (_TYPES[shapes.KINDS.get(column, "text")] | None, None) for column in columns
    }
    return create_model(name, **fields)


def answer(name: str, rows: dict[str, type[BaseModel]]) -> type[BaseModel]:
    """The model of an answer; rows by the key of their list, of which one is there."""
    lists: dict[str, Any] = {
        key: (list[model], ... if len(rows) == 1 else [])  # type: ignore[valid-type]
        for key, model in rows.items()
    }
    return create_model(
        name,
        __base__=Head,
        **lists,
        more=(bool, Field(description="The limit left some out.")),
        total=(dict[str, int], Field({}, description="Over all rows, those left out too.")),
        notes=(list[str], Field([], description="For people.")),
    )
