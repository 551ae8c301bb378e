use dormouse::{AgentConfig, InterfaceConfig, NetConfig, RestoreOptions};

use super::{Guest, block_on, config, sh};
use crate::network::set_up;

fn interface(network: u8) -> InterfaceConfig {
    let address = InterfaceConfig::new().address(format!("10.{network}.0.2/24"));
    address.gateway(format!("10.{network}.0.1"))
}

#[test]
fn the_agent_sets_the_network_up_and_a_clone_has_addresses_of_its_own() {
    block_on(async {
        let agent = AgentConfig::new().interface(interface(77));
        let guest = Guest::boot(config(agent).network(NetConfig::tap("dmagent0"))).await;
        set_up("dmagent0", "10.77.0.1/24");
        let asked =
            "ip addr show eth0; ip route; ping -c 1 -W 10 10.77.0.1 >/dev/null && echo reached";
        let said = guest.sh(asked).await;
        for word in ["10.77.0.2/24", "default via 10.77.0.1", "reached"] {
            assert!(said.contains(word), "{word} in {said}");
        }
        guest.agent.freeze().await.unwrap();
        let mut parent = guest.vm.pause().unwrap();
        let options = RestoreOptions::new();
        let options = options.network(0, NetConfig::tap("dmagent1")).interfaces([interface(78)]);
        let clone = parent.fork_with(1, |_| options.clone()).unwrap().remove(0);
        set_up("dmagent1", "10.78.0.1/24");
        let clone = clone.resume().unwrap();
        let agent = clone.agent().await.unwrap();
        let said = sh(&agent, &asked.replace("10.77", "10.78")).await.unwrap();
        for word in ["10.78.0.2/24", "default via 10.78.0.1", "reached"] {
            assert!(said.contains(word), "{word} in {said}");
        }
        assert!(!said.contains("10.77."), "{said}");
    });
}
