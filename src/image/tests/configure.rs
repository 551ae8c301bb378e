//! Images in the configurations of VMs.

use std::sync::Arc;

use super::super::cache::Cached;
use super::images::unpacked;
use super::*;
use crate::config::{AgentConfig, BlockConfig, Entrypoint, RootDisk, VmConfig};
use crate::kernel::Kernel;
use crate::{Image, ImageCache, ImageConfig};

fn agent_of(config: &VmConfig) -> AgentConfig {
    config.parts().3.agent.clone().expect("an agent")
}

#[test]
fn an_image_fills_in_what_the_caller_left_out_and_nothing_else() {
    let scratch = Scratch::new();
    scratch.file("tree/app", b"#!/bin/sh");
    let cache = ImageCache::open(scratch.0.join("cache")).unwrap();
    let plain = unpacked(Image::directory(scratch.0.join("tree")), &cache).unwrap();
    let config = ImageConfig {
        entrypoint: vec!["/app".to_owned()],
        cmd: vec!["serve".to_owned()],
        env: vec![("MODE".to_owned(), "image".to_owned())],
        user: Some("web".to_owned()),
        stop_signal: Some(3),
        ..ImageConfig::default()
    };
    let root = &plain.inner.root;
    let root = Cached { path: root.path.clone(), file: Arc::clone(&root.file) };
    let image = Image::new(config, None, root);
    let vm = || VmConfig::new(Kernel::bytes(&b"kernel"[..]));
    // The disk comes behind those that are there.
    let configured = image.configure(vm().block(BlockConfig::new("/data")));
    let agent = agent_of(&configured);
    assert_eq!(agent.root, Some(image.root(1)));
    assert_eq!(agent.entrypoint, image.config().entrypoint());
    // The root alone, for programs that the host starts.
    let agent = agent_of(&image.configure_root(vm()));
    assert_eq!((agent.root, agent.entrypoint), (Some(image.root(0)), None));
    // What the caller says stays.
    let own = Entrypoint::new(["/bin/sh"]).env("MODE", "mine").user("root");
    let asked = AgentConfig::new().root(RootDisk::new(0).overlay_memory(1 << 20)).entrypoint(own);
    let agent = agent_of(&image.configure(vm().agent(asked.clone())));
    assert_eq!((agent.root, agent.entrypoint), (asked.root, asked.entrypoint));
    // Parts of it too.
    let changed = image.config().entrypoint_with(&["check"]).unwrap().env("MODE", "mine");
    assert_eq!(changed.argv, ["/app", "check"]);
    let agent =
        agent_of(&image.configure(vm().agent(AgentConfig::new().entrypoint(changed.clone()))));
    assert_eq!(agent.entrypoint, Some(changed));
    // One without a configuration starts nothing.
    assert_eq!(agent_of(&plain.configure(vm())).entrypoint, None);
}
