//! Sessions behind an endpoint.

use std::sync::Arc;

use super::upstream::{Awake, Upstream, UpstreamFuture, UpstreamStream, Upstreams};
use crate::session::{Session, SessionState, Sessions};

impl Upstream for Session {
    fn wake(&self) -> UpstreamFuture<'_, Awake> {
        Box::pin(async {
            let awake = self.wake().await?;
            self.count_request();
            Ok(Awake::new(awake))
        })
    }

    fn connect(&self, port: u16) -> UpstreamFuture<'_, UpstreamStream> {
        Box::pin(async move { Ok(UpstreamStream::new(self.connect_unheld(port).await?)) })
    }

    fn is_up(&self) -> bool {
        self.state() == SessionState::Running
            && self.with_vm(|vm| vm.exit_status().is_none()) == Some(true)
    }
}

impl Upstreams for Sessions {
    fn find(&self, id: &str) -> Option<Arc<dyn Upstream>> {
        let session = self.get(id)?;
        // One that is over is kept for those who ask why; it serves nobody.
        let is_over = session.state() == SessionState::Terminated;
        (!is_over).then(|| Arc::new(session) as Arc<dyn Upstream>)
    }
}
