//! What all connections of an endpoint share.

use std::sync::Arc;

use super::guest::Guests;
use super::options::EndpointLimits;
use super::route::Routes;
use super::tasks::Tasks;
use super::token::TokenKeys;
use super::upstream::Upstreams;

pub(super) struct Shared {
    pub(super) upstreams: Box<dyn Upstreams>,
    pub(super) routes: Routes,
    /// None: everybody may come in.
    pub(super) keys: Option<TokenKeys>,
    pub(super) limits: Arc<EndpointLimits>,
    pub(super) guests: Guests,
    /// What is done for clients: connections and tunnels. They are waited for at the end.
    pub(super) clients: Tasks,
}
