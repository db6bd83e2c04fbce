"""The one route table: all APIs of a gateway, in the order in which a reader wants them."""

from embedmesh.gateway.api.account_api import AccountApi
from embedmesh.gateway.api.accounts_api import AccountsApi
from embedmesh.gateway.api.audit_api import AuditApi
from embedmesh.gateway.api.batches_api import BatchesApi
from embedmesh.gateway.api.confidential_api import ConfidentialApi
from embedmesh.gateway.api.confidential_generation_api import ConfidentialGenerationApi
from embedmesh.gateway.api.dialects_api import DialectsApi
from embedmesh.gateway.api.embeddings_api import EmbeddingsApi
from embedmesh.gateway.api.files_api import FilesApi
from embedmesh.gateway.api.fleet_api import FleetApi
from embedmesh.gateway.api.generation_api import GenerationApi
from embedmesh.gateway.api.invites_api import InvitesApi
from embedmesh.gateway.api.jobs_api import JobsApi
from embedmesh.gateway.api.keys_api import KeysApi
from embedmesh.gateway.api.ledger_api import LedgerApi
from embedmesh.gateway.api.models_api import ModelsApi
from embedmesh.gateway.api.nodes_api import NodesApi
from embedmesh.gateway.api.operations_api import OperationsApi
from embedmesh.gateway.api.pages_api import PagesApi
from embedmesh.gateway.api.prices_api import PricesApi
from embedmesh.gateway.api.reload_api import ReloadApi
from embedmesh.gateway.api.rerank_api import RerankApi
from embedmesh.gateway.api.routes import Api

APIS: tuple[type[Api], ...] = (
    EmbeddingsApi,
    RerankApi,
    GenerationApi,
    ConfidentialApi,
    ConfidentialGenerationApi,
    FilesApi,
    BatchesApi,
    JobsApi,
    ModelsApi,
    AccountApi,
    OperationsApi,
    PagesApi,
    DialectsApi,
    NodesApi,
    FleetApi,
    InvitesApi,
    AccountsApi,
    KeysApi,
    PricesApi,
    LedgerApi,
    ReloadApi,
    AuditApi,
)
