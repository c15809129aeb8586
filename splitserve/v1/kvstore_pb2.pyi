from splitserve.v1 import common_pb2 as _common_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class ReservationState(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    RESERVATION_STATE_UNSPECIFIED: _ClassVar[ReservationState]
    RESERVATION_STATE_WRITE: _ClassVar[ReservationState]
    RESERVATION_STATE_PRESENT: _ClassVar[ReservationState]
    RESERVATION_STATE_BEING_WRITTEN: _ClassVar[ReservationState]
RESERVATION_STATE_UNSPECIFIED: ReservationState
RESERVATION_STATE_WRITE: ReservationState
RESERVATION_STATE_PRESENT: ReservationState
RESERVATION_STATE_BEING_WRITTEN: ReservationState

class ConnectRequest(_message.Message):
    __slots__ = ("worker_id", "kv_layout")
    WORKER_ID_FIELD_NUMBER: _ClassVar[int]
    KV_LAYOUT_FIELD_NUMBER: _ClassVar[int]
    worker_id: str
    kv_layout: _common_pb2.KvLayout
    def __init__(self, worker_id: _Optional[str] = ..., kv_layout: _Optional[_Union[_common_pb2.KvLayout, _Mapping]] = ...) -> None: ...

class ConnectResponse(_message.Message):
    __slots__ = ("epoch", "handle_socket", "arena_bytes", "advertised_address")
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    HANDLE_SOCKET_FIELD_NUMBER: _ClassVar[int]
    ARENA_BYTES_FIELD_NUMBER: _ClassVar[int]
    ADVERTISED_ADDRESS_FIELD_NUMBER: _ClassVar[int]
    epoch: int
    handle_socket: str
    arena_bytes: int
    advertised_address: str
    def __init__(self, epoch: _Optional[int] = ..., handle_socket: _Optional[str] = ..., arena_bytes: _Optional[int] = ..., advertised_address: _Optional[str] = ...) -> None: ...

class GrantLeaseRequest(_message.Message):
    __slots__ = ("owner", "ttl_ms")
    OWNER_FIELD_NUMBER: _ClassVar[int]
    TTL_MS_FIELD_NUMBER: _ClassVar[int]
    owner: str
    ttl_ms: int
    def __init__(self, owner: _Optional[str] = ..., ttl_ms: _Optional[int] = ...) -> None: ...

class GrantLeaseResponse(_message.Message):
    __slots__ = ("lease",)
    LEASE_FIELD_NUMBER: _ClassVar[int]
    lease: _common_pb2.LeaseRef
    def __init__(self, lease: _Optional[_Union[_common_pb2.LeaseRef, _Mapping]] = ...) -> None: ...

class RenewLeasesRequest(_message.Message):
    __slots__ = ("leases", "ttl_ms")
    LEASES_FIELD_NUMBER: _ClassVar[int]
    TTL_MS_FIELD_NUMBER: _ClassVar[int]
    leases: _containers.RepeatedCompositeFieldContainer[_common_pb2.LeaseRef]
    ttl_ms: int
    def __init__(self, leases: _Optional[_Iterable[_Union[_common_pb2.LeaseRef, _Mapping]]] = ..., ttl_ms: _Optional[int] = ...) -> None: ...

class RenewLeasesResponse(_message.Message):
    __slots__ = ("ended_lease_ids",)
    ENDED_LEASE_IDS_FIELD_NUMBER: _ClassVar[int]
    ended_lease_ids: _containers.RepeatedScalarFieldContainer[str]
    def __init__(self, ended_lease_ids: _Optional[_Iterable[str]] = ...) -> None: ...

class ReleaseLeasesRequest(_message.Message):
    __slots__ = ("leases",)
    LEASES_FIELD_NUMBER: _ClassVar[int]
    leases: _containers.RepeatedCompositeFieldContainer[_common_pb2.LeaseRef]
    def __init__(self, leases: _Optional[_Iterable[_Union[_common_pb2.LeaseRef, _Mapping]]] = ...) -> None: ...

class ReleaseLeasesResponse(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class ReserveBlocksRequest(_message.Message):
    __slots__ = ("lease", "blocks", "pool_id")
    LEASE_FIELD_NUMBER: _ClassVar[int]
    BLOCKS_FIELD_NUMBER: _ClassVar[int]
    POOL_ID_FIELD_NUMBER: _ClassVar[int]
    lease: _common_pb2.LeaseRef
    blocks: _containers.RepeatedCompositeFieldContainer[BlockSpec]
    pool_id: int
    def __init__(self, lease: _Optional[_Union[_common_pb2.LeaseRef, _Mapping]] = ..., blocks: _Optional[_Iterable[_Union[BlockSpec, _Mapping]]] = ..., pool_id: _Optional[int] = ...) -> None: ...

class BlockSpec(_message.Message):
    __slots__ = ("key", "size_bytes", "num_tokens")
    KEY_FIELD_NUMBER: _ClassVar[int]
    SIZE_BYTES_FIELD_NUMBER: _ClassVar[int]
    NUM_TOKENS_FIELD_NUMBER: _ClassVar[int]
    key: bytes
    size_bytes: int
    num_tokens: int
    def __init__(self, key: _Optional[bytes] = ..., size_bytes: _Optional[int] = ..., num_tokens: _Optional[int] = ...) -> None: ...

class ReserveBlocksResponse(_message.Message):
    __slots__ = ("reservations",)
    RESERVATIONS_FIELD_NUMBER: _ClassVar[int]
    reservations: _containers.RepeatedCompositeFieldContainer[Reservation]
    def __init__(self, reservations: _Optional[_Iterable[_Union[Reservation, _Mapping]]] = ...) -> None: ...

class Reservation(_message.Message):
    __slots__ = ("state", "arena_offset", "in_pool")
    STATE_FIELD_NUMBER: _ClassVar[int]
    ARENA_OFFSET_FIELD_NUMBER: _ClassVar[int]
    IN_POOL_FIELD_NUMBER: _ClassVar[int]
    state: ReservationState
    arena_offset: int
    in_pool: bool
    def __init__(self, state: _Optional[_Union[ReservationState, str]] = ..., arena_offset: _Optional[int] = ..., in_pool: _Optional[bool] = ...) -> None: ...

class WriteBlocksRequest(_message.Message):
    __slots__ = ("lease", "key", "offset_bytes", "data")
    LEASE_FIELD_NUMBER: _ClassVar[int]
    KEY_FIELD_NUMBER: _ClassVar[int]
    OFFSET_BYTES_FIELD_NUMBER: _ClassVar[int]
    DATA_FIELD_NUMBER: _ClassVar[int]
    lease: _common_pb2.LeaseRef
    key: bytes
    offset_bytes: int
    data: bytes
    def __init__(self, lease: _Optional[_Union[_common_pb2.LeaseRef, _Mapping]] = ..., key: _Optional[bytes] = ..., offset_bytes: _Optional[int] = ..., data: _Optional[bytes] = ...) -> None: ...

class WriteBlocksResponse(_message.Message):
    __slots__ = ("written_bytes",)
    WRITTEN_BYTES_FIELD_NUMBER: _ClassVar[int]
    written_bytes: int
    def __init__(self, written_bytes: _Optional[int] = ...) -> None: ...

class CommitBlocksRequest(_message.Message):
    __slots__ = ("lease", "blocks", "in_pool")
    LEASE_FIELD_NUMBER: _ClassVar[int]
    BLOCKS_FIELD_NUMBER: _ClassVar[int]
    IN_POOL_FIELD_NUMBER: _ClassVar[int]
    lease: _common_pb2.LeaseRef
    blocks: _containers.RepeatedCompositeFieldContainer[BlockCommit]
    in_pool: PoolCommit
    def __init__(self, lease: _Optional[_Union[_common_pb2.LeaseRef, _Mapping]] = ..., blocks: _Optional[_Iterable[_Union[BlockCommit, _Mapping]]] = ..., in_pool: _Optional[_Union[PoolCommit, _Mapping]] = ...) -> None: ...

class BlockCommit(_message.Message):
    __slots__ = ("key", "digest")
    KEY_FIELD_NUMBER: _ClassVar[int]
    DIGEST_FIELD_NUMBER: _ClassVar[int]
    key: bytes
    digest: bytes
    def __init__(self, key: _Optional[bytes] = ..., digest: _Optional[bytes] = ...) -> None: ...

class PoolCommit(_message.Message):
    __slots__ = ("pool_id", "share_id", "keys", "pages", "digests")
    POOL_ID_FIELD_NUMBER: _ClassVar[int]
    SHARE_ID_FIELD_NUMBER: _ClassVar[int]
    KEYS_FIELD_NUMBER: _ClassVar[int]
    PAGES_FIELD_NUMBER: _ClassVar[int]
    DIGESTS_FIELD_NUMBER: _ClassVar[int]
    pool_id: int
    share_id: int
    keys: bytes
    pages: _containers.RepeatedScalarFieldContainer[int]
    digests: bytes
    def __init__(self, pool_id: _Optional[int] = ..., share_id: _Optional[int] = ..., keys: _Optional[bytes] = ..., pages: _Optional[_Iterable[int]] = ..., digests: _Optional[bytes] = ...) -> None: ...

class PoolPage(_message.Message):
    __slots__ = ("pool_id", "page", "share_id")
    POOL_ID_FIELD_NUMBER: _ClassVar[int]
    PAGE_FIELD_NUMBER: _ClassVar[int]
    SHARE_ID_FIELD_NUMBER: _ClassVar[int]
    pool_id: int
    page: int
    share_id: int
    def __init__(self, pool_id: _Optional[int] = ..., page: _Optional[int] = ..., share_id: _Optional[int] = ...) -> None: ...

class CommitBlocksResponse(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class ReportLayersRequest(_message.Message):
    __slots__ = ("lease", "blocks")
    LEASE_FIELD_NUMBER: _ClassVar[int]
    BLOCKS_FIELD_NUMBER: _ClassVar[int]
    lease: _common_pb2.LeaseRef
    blocks: _containers.RepeatedCompositeFieldContainer[PartialBlock]
    def __init__(self, lease: _Optional[_Union[_common_pb2.LeaseRef, _Mapping]] = ..., blocks: _Optional[_Iterable[_Union[PartialBlock, _Mapping]]] = ...) -> None: ...

class PartialBlock(_message.Message):
    __slots__ = ("key", "pool_page", "num_layers")
    KEY_FIELD_NUMBER: _ClassVar[int]
    POOL_PAGE_FIELD_NUMBER: _ClassVar[int]
    NUM_LAYERS_FIELD_NUMBER: _ClassVar[int]
    key: bytes
    pool_page: PoolPage
    num_layers: int
    def __init__(self, key: _Optional[bytes] = ..., pool_page: _Optional[_Union[PoolPage, _Mapping]] = ..., num_layers: _Optional[int] = ...) -> None: ...

class ReportLayersResponse(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class AbandonBlocksRequest(_message.Message):
    __slots__ = ("lease", "keys")
    LEASE_FIELD_NUMBER: _ClassVar[int]
    KEYS_FIELD_NUMBER: _ClassVar[int]
    lease: _common_pb2.LeaseRef
    keys: _containers.RepeatedScalarFieldContainer[bytes]
    def __init__(self, lease: _Optional[_Union[_common_pb2.LeaseRef, _Mapping]] = ..., keys: _Optional[_Iterable[bytes]] = ...) -> None: ...

class AbandonBlocksResponse(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class AwaitBlocksRequest(_message.Message):
    __slots__ = ("lease", "keys", "wait_for_writer", "pool_domain", "unmapped_pool_ids")
    LEASE_FIELD_NUMBER: _ClassVar[int]
    KEYS_FIELD_NUMBER: _ClassVar[int]
    WAIT_FOR_WRITER_FIELD_NUMBER: _ClassVar[int]
    POOL_DOMAIN_FIELD_NUMBER: _ClassVar[int]
    UNMAPPED_POOL_IDS_FIELD_NUMBER: _ClassVar[int]
    lease: _common_pb2.LeaseRef
    keys: _containers.RepeatedScalarFieldContainer[bytes]
    wait_for_writer: bool
    pool_domain: str
    unmapped_pool_ids: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, lease: _Optional[_Union[_common_pb2.LeaseRef, _Mapping]] = ..., keys: _Optional[_Iterable[bytes]] = ..., wait_for_writer: _Optional[bool] = ..., pool_domain: _Optional[str] = ..., unmapped_pool_ids: _Optional[_Iterable[int]] = ...) -> None: ...

class AwaitBlocksResponse(_message.Message):
    __slots__ = ("ready", "missing_keys", "partial")
    READY_FIELD_NUMBER: _ClassVar[int]
    MISSING_KEYS_FIELD_NUMBER: _ClassVar[int]
    PARTIAL_FIELD_NUMBER: _ClassVar[int]
    ready: _containers.RepeatedCompositeFieldContainer[ReadableBlock]
    missing_keys: _containers.RepeatedScalarFieldContainer[bytes]
    partial: _containers.RepeatedCompositeFieldContainer[PartialBlock]
    def __init__(self, ready: _Optional[_Iterable[_Union[ReadableBlock, _Mapping]]] = ..., missing_keys: _Optional[_Iterable[bytes]] = ..., partial: _Optional[_Iterable[_Union[PartialBlock, _Mapping]]] = ...) -> None: ...

class ReadableBlock(_message.Message):
    __slots__ = ("key", "arena_offset", "size_bytes", "digest", "num_tokens", "pool_page")
    KEY_FIELD_NUMBER: _ClassVar[int]
    ARENA_OFFSET_FIELD_NUMBER: _ClassVar[int]
    SIZE_BYTES_FIELD_NUMBER: _ClassVar[int]
    DIGEST_FIELD_NUMBER: _ClassVar[int]
    NUM_TOKENS_FIELD_NUMBER: _ClassVar[int]
    POOL_PAGE_FIELD_NUMBER: _ClassVar[int]
    key: bytes
    arena_offset: int
    size_bytes: int
    digest: bytes
    num_tokens: int
    pool_page: PoolPage
    def __init__(self, key: _Optional[bytes] = ..., arena_offset: _Optional[int] = ..., size_bytes: _Optional[int] = ..., digest: _Optional[bytes] = ..., num_tokens: _Optional[int] = ..., pool_page: _Optional[_Union[PoolPage, _Mapping]] = ...) -> None: ...

class ReadBlocksRequest(_message.Message):
    __slots__ = ("lease", "keys")
    LEASE_FIELD_NUMBER: _ClassVar[int]
    KEYS_FIELD_NUMBER: _ClassVar[int]
    lease: _common_pb2.LeaseRef
    keys: _containers.RepeatedScalarFieldContainer[bytes]
    def __init__(self, lease: _Optional[_Union[_common_pb2.LeaseRef, _Mapping]] = ..., keys: _Optional[_Iterable[bytes]] = ...) -> None: ...

class ReadBlocksResponse(_message.Message):
    __slots__ = ("key", "offset_bytes", "data")
    KEY_FIELD_NUMBER: _ClassVar[int]
    OFFSET_BYTES_FIELD_NUMBER: _ClassVar[int]
    DATA_FIELD_NUMBER: _ClassVar[int]
    key: bytes
    offset_bytes: int
    data: bytes
    def __init__(self, key: _Optional[bytes] = ..., offset_bytes: _Optional[int] = ..., data: _Optional[bytes] = ...) -> None: ...

class DropBlocksRequest(_message.Message):
    __slots__ = ("lease", "blocks")
    LEASE_FIELD_NUMBER: _ClassVar[int]
    BLOCKS_FIELD_NUMBER: _ClassVar[int]
    lease: _common_pb2.LeaseRef
    blocks: _containers.RepeatedCompositeFieldContainer[DamagedBlock]
    def __init__(self, lease: _Optional[_Union[_common_pb2.LeaseRef, _Mapping]] = ..., blocks: _Optional[_Iterable[_Union[DamagedBlock, _Mapping]]] = ...) -> None: ...

class DamagedBlock(_message.Message):
    __slots__ = ("key", "digest")
    KEY_FIELD_NUMBER: _ClassVar[int]
    DIGEST_FIELD_NUMBER: _ClassVar[int]
    key: bytes
    digest: bytes
    def __init__(self, key: _Optional[bytes] = ..., digest: _Optional[bytes] = ...) -> None: ...

class DropBlocksResponse(_message.Message):
    __slots__ = ("num_dropped",)
    NUM_DROPPED_FIELD_NUMBER: _ClassVar[int]
    num_dropped: int
    def __init__(self, num_dropped: _Optional[int] = ...) -> None: ...

class LetGoBlocksRequest(_message.Message):
    __slots__ = ("lease", "keys")
    LEASE_FIELD_NUMBER: _ClassVar[int]
    KEYS_FIELD_NUMBER: _ClassVar[int]
    lease: _common_pb2.LeaseRef
    keys: _containers.RepeatedScalarFieldContainer[bytes]
    def __init__(self, lease: _Optional[_Union[_common_pb2.LeaseRef, _Mapping]] = ..., keys: _Optional[_Iterable[bytes]] = ...) -> None: ...

class LetGoBlocksResponse(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class SharePoolRequest(_message.Message):
    __slots__ = ("worker_id", "domain", "handle")
    WORKER_ID_FIELD_NUMBER: _ClassVar[int]
    DOMAIN_FIELD_NUMBER: _ClassVar[int]
    HANDLE_FIELD_NUMBER: _ClassVar[int]
    worker_id: str
    domain: str
    handle: bytes
    def __init__(self, worker_id: _Optional[str] = ..., domain: _Optional[str] = ..., handle: _Optional[bytes] = ...) -> None: ...

class SharePoolResponse(_message.Message):
    __slots__ = ("pool_id", "gone", "wanted")
    POOL_ID_FIELD_NUMBER: _ClassVar[int]
    GONE_FIELD_NUMBER: _ClassVar[int]
    WANTED_FIELD_NUMBER: _ClassVar[int]
    pool_id: int
    gone: _containers.RepeatedCompositeFieldContainer[SharedBlock]
    wanted: _containers.RepeatedCompositeFieldContainer[SharedBlock]
    def __init__(self, pool_id: _Optional[int] = ..., gone: _Optional[_Iterable[_Union[SharedBlock, _Mapping]]] = ..., wanted: _Optional[_Iterable[_Union[SharedBlock, _Mapping]]] = ...) -> None: ...

class SharedBlock(_message.Message):
    __slots__ = ("key", "share_id")
    KEY_FIELD_NUMBER: _ClassVar[int]
    SHARE_ID_FIELD_NUMBER: _ClassVar[int]
    key: bytes
    share_id: int
    def __init__(self, key: _Optional[bytes] = ..., share_id: _Optional[int] = ...) -> None: ...

class WatchPoolsRequest(_message.Message):
    __slots__ = ("domain",)
    DOMAIN_FIELD_NUMBER: _ClassVar[int]
    domain: str
    def __init__(self, domain: _Optional[str] = ...) -> None: ...

class WatchPoolsResponse(_message.Message):
    __slots__ = ("pools",)
    POOLS_FIELD_NUMBER: _ClassVar[int]
    pools: _containers.RepeatedCompositeFieldContainer[Pool]
    def __init__(self, pools: _Optional[_Iterable[_Union[Pool, _Mapping]]] = ...) -> None: ...

class Pool(_message.Message):
    __slots__ = ("pool_id", "handle")
    POOL_ID_FIELD_NUMBER: _ClassVar[int]
    HANDLE_FIELD_NUMBER: _ClassVar[int]
    pool_id: int
    handle: bytes
    def __init__(self, pool_id: _Optional[int] = ..., handle: _Optional[bytes] = ...) -> None: ...

class LookupBlocksRequest(_message.Message):
    __slots__ = ("keys",)
    KEYS_FIELD_NUMBER: _ClassVar[int]
    keys: _containers.RepeatedScalarFieldContainer[bytes]
    def __init__(self, keys: _Optional[_Iterable[bytes]] = ...) -> None: ...

class LookupBlocksResponse(_message.Message):
    __slots__ = ("holders",)
    HOLDERS_FIELD_NUMBER: _ClassVar[int]
    holders: _containers.RepeatedCompositeFieldContainer[PrefixHolder]
    def __init__(self, holders: _Optional[_Iterable[_Union[PrefixHolder, _Mapping]]] = ...) -> None: ...

class PrefixHolder(_message.Message):
    __slots__ = ("holder_id", "num_blocks")
    HOLDER_ID_FIELD_NUMBER: _ClassVar[int]
    NUM_BLOCKS_FIELD_NUMBER: _ClassVar[int]
    holder_id: str
    num_blocks: int
    def __init__(self, holder_id: _Optional[str] = ..., num_blocks: _Optional[int] = ...) -> None: ...

class PublishBlocksRequest(_message.Message):
    __slots__ = ("holder_id", "added_keys", "removed_keys")
    HOLDER_ID_FIELD_NUMBER: _ClassVar[int]
    ADDED_KEYS_FIELD_NUMBER: _ClassVar[int]
    REMOVED_KEYS_FIELD_NUMBER: _ClassVar[int]
    holder_id: str
    added_keys: _containers.RepeatedScalarFieldContainer[bytes]
    removed_keys: _containers.RepeatedScalarFieldContainer[bytes]
    def __init__(self, holder_id: _Optional[str] = ..., added_keys: _Optional[_Iterable[bytes]] = ..., removed_keys: _Optional[_Iterable[bytes]] = ...) -> None: ...

class PublishBlocksResponse(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class GetStatsRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class GetStatsResponse(_message.Message):
    __slots__ = ("epoch", "live_leases", "committed_blocks", "reserved_blocks", "held_blocks", "used_bytes", "arena_bytes", "directory_entries")
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    LIVE_LEASES_FIELD_NUMBER: _ClassVar[int]
    COMMITTED_BLOCKS_FIELD_NUMBER: _ClassVar[int]
    RESERVED_BLOCKS_FIELD_NUMBER: _ClassVar[int]
    HELD_BLOCKS_FIELD_NUMBER: _ClassVar[int]
    USED_BYTES_FIELD_NUMBER: _ClassVar[int]
    ARENA_BYTES_FIELD_NUMBER: _ClassVar[int]
    DIRECTORY_ENTRIES_FIELD_NUMBER: _ClassVar[int]
    epoch: int
    live_leases: int
    committed_blocks: int
    reserved_blocks: int
    held_blocks: int
    used_bytes: int
    arena_bytes: int
    directory_entries: int
    def __init__(self, epoch: _Optional[int] = ..., live_leases: _Optional[int] = ..., committed_blocks: _Optional[int] = ..., reserved_blocks: _Optional[int] = ..., held_blocks: _Optional[int] = ..., used_bytes: _Optional[int] = ..., arena_bytes: _Optional[int] = ..., directory_entries: _Optional[int] = ...) -> None: ...
