//! Who is let in, and who is not.

use std::sync::Arc;
use std::sync::atomic::AtomicUsize;
use std::sync::atomic::Ordering::SeqCst;
use std::time::{Duration, SystemTime};

use dormouse::{
    Endpoint, EndpointOptions, Error, ErrorKind, Token, TokenClient, TokenKeys, TokenPorts,
};
use pasetors::claims::Claims;
use pasetors::keys::SymmetricKey;
use pasetors::version4::{LocalToken, V4};
use tokio::task::JoinSet;

use crate::client::{get, h1, read, request};
use crate::{Setup, run};

const HOUR: Duration = Duration::from_secs(3600);
const SECRET: [u8; 32] = [7; 32];

async fn locked() -> (TokenKeys, Setup) {
    let keys = TokenKeys::new("first", &SECRET).unwrap();
    let setup = Setup::new(EndpointOptions::new().tokens(keys.clone())).await;
    (keys, setup)
}

/// The status, and the stage where the application was not asked.
async fn ask(setup: &Setup, host: &str, token: &str) -> (u16, String) {
    let header = format!("X-aws-proxy-auth: {token}\r\n");
    let answer = get(setup.endpoint.address(), host, "/seen", &header).await;
    let stage = if answer.status == 200 { String::new() } else { answer.stage() };
    assert!(!answer.body.contains(token), "{answer:?}");
    (answer.status, stage)
}

fn is_forbidden(answer: (u16, String)) -> bool {
    answer == (403, "token".to_owned())
}

#[test]
fn a_token_opens_the_ports_of_its_session_until_it_expires() {
    run(async {
        let (keys, setup) = locked().await;
        for ports in [8080.into(), (8000..=9000).into(), TokenPorts::ALL] {
            let token = keys.mint("one", ports, HOUR).unwrap();
            assert_eq!(ask(&setup, "one.localhost", token.as_str()).await, (200, String::new()));
        }
        for ports in [TokenPorts::from(8081), (1..=8079).into()] {
            let token = keys.mint("one", ports, HOUR).unwrap();
            assert!(is_forbidden(ask(&setup, "one.localhost", token.as_str()).await), "{ports:?}");
        }
        let other = keys.mint("two", TokenPorts::ALL, HOUR).unwrap();
        assert!(is_forbidden(ask(&setup, "one.localhost", other.as_str()).await));
        let expired = keys.mint("one", TokenPorts::ALL, Duration::ZERO).unwrap();
        tokio::time::sleep(Duration::from_millis(1100)).await;
        assert!(is_forbidden(ask(&setup, "one.localhost", expired.as_str()).await));
        assert_eq!(setup.guest.wakes.load(SeqCst), 3);
    });
}

#[test]
fn what_is_no_token_of_the_endpoint_opens_nothing() {
    run(async {
        let (keys, setup) = locked().await;
        let address = setup.endpoint.address();
        let answer = get(address, "one.localhost", "/", "").await;
        assert_eq!((answer.status, answer.stage().as_str()), (403, "token"));
        let token = keys.mint("one", TokenPorts::ALL, HOUR).unwrap();
        let token = token.as_str();
        let stranger = TokenKeys::new("first", &[8; 32]).unwrap();
        let unknown = TokenKeys::new("second", &SECRET).unwrap();
        let mut forged = vec![
            "x".to_owned(),
            "v4.local.".to_owned(),
            "v4.public.AAAA".to_owned(),
            token.replace("v4", "v3"),
            token[..token.len() - 1].to_owned(),
            token.rsplit_once('.').unwrap().0.to_owned(),
            format!("{token}.x"),
            format!("Bearer {token}"),
            "v4.local.".to_owned() + &"A".repeat(40_000),
            stranger.mint("one", TokenPorts::ALL, HOUR).unwrap().as_str().to_owned(),
            unknown.mint("one", TokenPorts::ALL, HOUR).unwrap().as_str().to_owned(),
        ];
        // Every character of it counts.
        for place in (9..token.len()).step_by(7) {
            let other = if token.as_bytes()[place] == b'A' { "B" } else { "A" };
            let mut changed = token.to_owned();
            changed.replace_range(place..=place, other);
            forged.push(changed);
        }
        for token in forged {
            assert!(is_forbidden(ask(&setup, "one.localhost", &token).await), "{token}");
        }
        let twice = format!("X-aws-proxy-auth: {token}\r\n").repeat(2);
        assert_eq!(get(address, "one.localhost", "/", &twice).await.status, 400);
        assert_eq!(setup.guest.wakes.load(SeqCst), 0);
        assert_eq!(ask(&setup, "one.localhost", token).await.0, 200);
    });
}

#[test]
fn a_token_that_the_same_key_made_for_something_else_opens_nothing() {
    run(async {
        let (_, setup) = locked().await;
        let key = SymmetricKey::<V4>::from(&SECRET).unwrap();
        let mint = |change: &dyn Fn(&mut Claims)| {
            let mut claims = Claims::new_expires_in(&HOUR).unwrap();
            claims.audience("dormouse-endpoint").unwrap();
            claims.subject("one").unwrap();
            let ports = serde_json::json!({ "first": 1, "last": 65535 });
            claims.add_additional("ports", ports).unwrap();
            change(&mut claims);
            let claims = claims.to_string().unwrap();
            LocalToken::encrypt(&key, claims.as_bytes(), Some(br#"{"kid":"first"}"#), None).unwrap()
        };
        assert_eq!(ask(&setup, "one.localhost", &mint(&|_| {})).await.0, 200);
        let others: [&dyn Fn(&mut Claims); 7] = [
            &|claims| claims.audience("another").unwrap(),
            &|claims| claims.non_expiring(),
            &|claims| claims.subject("ONE").unwrap(),
            &|claims| claims.expiration("2020-01-01T00:00:00Z").unwrap(),
            &|claims| claims.issued_at("2020-01-01T00:00:00Z").unwrap(),
            &|claims| claims.issued_at("2999-01-01T00:00:00Z").unwrap(),
            &|claims| claims.not_before("2999-01-01T00:00:00Z").unwrap(),
        ];
        for (number, change) in others.iter().enumerate() {
            let answer = ask(&setup, "one.localhost", &mint(change)).await;
            // When it was made does not matter: a clock that was set back since then makes no token invalid.
            assert_eq!(is_forbidden(answer), number < 4, "{number}");
        }
    });
}

#[test]
fn who_has_no_token_does_not_hear_whether_there_is_a_session() {
    run(async {
        let (keys, setup) = locked().await;
        let address = setup.endpoint.address();
        let one = get(address, "one.localhost", "/", "").await;
        let nobody = get(address, "nobody.localhost", "/", "").await;
        assert_eq!((one.status, nobody.status), (403, 403));
        assert_eq!(one.json()["error"], nobody.json()["error"]);
        let token = keys.mint("nobody", 8080, HOUR).unwrap();
        assert_eq!(
            ask(&setup, "nobody.localhost", token.as_str()).await,
            (404, "route".to_owned())
        );
    });
}

#[test]
fn keys_are_replaced_without_a_token_being_refused() {
    run(async {
        let (keys, setup) = locked().await;
        let old = keys.mint("one", 8080, HOUR).unwrap();
        let name = keys.rotate().unwrap();
        assert_eq!(keys.current(), name);
        let new = keys.mint("one", 8080, HOUR).unwrap();
        for token in [&old, &new] {
            assert_eq!(ask(&setup, "one.localhost", token.as_str()).await.0, 200);
        }
        assert_eq!(*keys.remove(&name).unwrap_err().kind(), ErrorKind::Config);
        assert!(keys.remove("first").unwrap());
        assert!(!keys.remove("first").unwrap());
        assert!(is_forbidden(ask(&setup, "one.localhost", old.as_str()).await));
        assert_eq!(ask(&setup, "one.localhost", new.as_str()).await.0, 200);
        // A key that another process makes tokens with, behind all random names.
        let other = TokenKeys::new("other", &[9; 32]).unwrap();
        let token = other.mint("one", 8080, HOUR).unwrap();
        assert!(is_forbidden(ask(&setup, "one.localhost", token.as_str()).await));
        keys.add("other", &[9; 32]).unwrap();
        assert_eq!(ask(&setup, "one.localhost", token.as_str()).await.0, 200);
        assert_eq!(keys.current(), name);
        assert_eq!(format!("{keys:?}"), format!("{{{:?}, \"other\"}}", name));
    });
}

#[test]
fn what_makes_no_token_is_refused() {
    let keys = TokenKeys::generate().unwrap();
    for session in ["", "A", "a.b", "-a", "a_b", &"a".repeat(64)] {
        let error = keys.mint(session, 8080, HOUR).unwrap_err();
        assert_eq!(*error.kind(), ErrorKind::Config, "{session}");
    }
    for lifetime in [Duration::MAX, Duration::from_millis(u64::MAX), HOUR * 24 * 366 * 8000] {
        assert_eq!(*keys.mint("a", 8080, lifetime).unwrap_err().kind(), ErrorKind::Token);
    }
    keys.mint("a", 8080, HOUR * 24 * 365 * 100).unwrap();
    #[expect(clippy::reversed_empty_ranges, reason = "a range of nothing is what is refused")]
    let none: [dormouse::TokenPorts; 3] = [0.into(), (0..=0).into(), (3010..=3000).into()];
    for ports in none {
        assert_eq!(*keys.mint("a", ports, HOUR).unwrap_err().kind(), ErrorKind::Config);
    }
    for id in ["", "a b", "a\"b", &"a".repeat(65)] {
        assert_eq!(*TokenKeys::new(id, &SECRET).unwrap_err().kind(), ErrorKind::Config, "{id}");
    }
    let token = keys.mint("a", 8080, HOUR).unwrap();
    assert!(!format!("{token:?}").contains(token.as_str()));
}

#[test]
fn an_endpoint_without_tokens_has_to_be_asked_for_and_is_this_machines_own() {
    run(async {
        let nobody = |_: &str| None;
        let unsaid = Endpoint::bind("127.0.0.1:0", nobody, EndpointOptions::new()).await;
        assert_eq!(*unsaid.unwrap_err().kind(), ErrorKind::Config);
        let error = Endpoint::bind("0.0.0.0:0", nobody, crate::open()).await.unwrap_err();
        assert_eq!(*error.kind(), ErrorKind::Config);
        assert!(error.to_string().contains("0.0.0.0"), "{error}");
        let keys = TokenKeys::generate().unwrap();
        let _ =
            Endpoint::bind("0.0.0.0:0", nobody, EndpointOptions::new().tokens(keys)).await.unwrap();
    });
}

#[test]
fn a_client_renews_its_token_once_for_all_before_it_expires() {
    run(async {
        let (keys, setup) = locked().await;
        let client = TokenClient::minting(keys.clone(), "one", 8080, HOUR);
        let token = client.token().await.unwrap();
        assert_eq!(ask(&setup, "one.localhost", token.as_str()).await.0, 200);
        assert_eq!(client.token().await.unwrap(), token);

        let minted = Arc::new(AtomicUsize::new(0));
        let count = Arc::clone(&minted);
        let client = TokenClient::new(move || {
            let number = count.fetch_add(1, SeqCst);
            async move {
                tokio::time::sleep(Duration::from_millis(50)).await;
                let expires = SystemTime::now() + Duration::from_secs(5);
                Ok::<_, Error>(Token::new(format!("t{number}"), expires))
            }
        });
        let mut callers = JoinSet::new();
        for _ in 0..20 {
            let client = client.clone();
            callers.spawn(async move { client.token().await.unwrap().as_str().to_owned() });
        }
        assert!(callers.join_all().await.iter().all(|token| token == "t0"));
        // Four fifths of its time are over.
        tokio::time::sleep(Duration::from_millis(4100)).await;
        assert_eq!(client.token().await.unwrap().as_str(), "t1");
        assert_eq!(minted.load(SeqCst), 2);
    });
}

#[test]
fn a_client_whose_token_cannot_be_renewed_uses_it_as_long_as_it_lasts() {
    run(async {
        let asked = Arc::new(AtomicUsize::new(0));
        let count = Arc::clone(&asked);
        let client = TokenClient::new(move || {
            let number = count.fetch_add(1, SeqCst);
            async move {
                let expires = SystemTime::now() + Duration::from_millis(500);
                if number == 0 { Ok(Token::new("t", expires)) } else { Err("the service is down") }
            }
        });
        assert_eq!(client.token().await.unwrap().as_str(), "t");
        tokio::time::sleep(Duration::from_millis(410)).await;
        // Whether it still lasts is for a slow machine to say, but not what is answered then.
        match client.token().await {
            Ok(token) => assert_eq!(token.as_str(), "t"),
            Err(error) => assert_eq!(*error.kind(), ErrorKind::Token),
        }
        tokio::time::sleep(Duration::from_millis(200)).await;
        let error = client.token().await.unwrap_err();
        assert_eq!(*error.kind(), ErrorKind::Token);
        assert!(asked.load(SeqCst) >= 3);
    });
}

#[test]
fn a_connection_that_was_let_in_is_looked_at_again_each_time() {
    run(async {
        let (keys, setup) = locked().await;
        let mut sender = h1(setup.endpoint.address()).await;
        let mut ask = async |token: &Token, host: &str| {
            let mut request = request("/hello");
            let headers = request.headers_mut();
            headers.insert("host", host.parse().unwrap());
            headers.insert("x-aws-proxy-auth", token.as_str().parse().unwrap());
            sender.ready().await.unwrap();
            read(sender.send_request(request).await.unwrap()).await.0.as_u16()
        };
        let token = keys.mint("one", 8080, HOUR).unwrap();
        let short = keys.mint("one", 8080, Duration::from_secs(1)).unwrap();
        assert_eq!(ask(&token, "one.localhost").await, 200);
        assert_eq!(ask(&token, "two.localhost").await, 403);
        let mut forged = token.as_str().to_owned();
        forged.replace_range(20..21, if &forged[20..21] == "A" { "B" } else { "A" });
        let forged = Token::new(forged, token.expires());
        assert_eq!(ask(&forged, "one.localhost").await, 403);
        assert_eq!(ask(&token, "one.localhost").await, 200);
        while ask(&short, "one.localhost").await == 200 {
            tokio::time::sleep(Duration::from_millis(100)).await;
        }
        assert_eq!(ask(&token, "one.localhost").await, 200);
        keys.rotate().unwrap();
        assert_eq!(ask(&token, "one.localhost").await, 200);
        keys.remove("first").unwrap();
        assert_eq!(ask(&token, "one.localhost").await, 403);
    });
}
