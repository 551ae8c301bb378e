//! WebSockets through the endpoint, with another project's client and server.

use std::time::Duration;

use dormouse::{EndpointOptions, TokenKeys};
use futures_util::{SinkExt, StreamExt};
use hyper::header::HeaderValue;
use tokio::net::TcpStream;
use tokio::task::JoinSet;
use tokio_tungstenite::tungstenite::client::IntoClientRequest;
use tokio_tungstenite::tungstenite::handshake::client::Response as Accepted;
use tokio_tungstenite::tungstenite::handshake::server::{Request, Response};
use tokio_tungstenite::tungstenite::http;
use tokio_tungstenite::tungstenite::{Error, Message};
use tokio_tungstenite::{WebSocketStream, accept_hdr_async, client_async};

use crate::app::App;
use crate::client::{exchange, get, talk};
use crate::{Setup, open, run};

/// An application that says back what it hears; of subprotocols it knows `chat`.
pub async fn echo() -> App {
    App::serve(|stream| async move {
        #[expect(clippy::result_large_err, reason = "the callback's type is tungstenite's")]
        let choose = |request: &Request, mut answer: Response| {
            let offered = request.headers().get("sec-websocket-protocol");
            let offered = offered.map(|offered| offered.to_str().unwrap().to_owned());
            if let Some(offered) = offered {
                if offered.split(", ").any(|name| name == "chat") {
                    let name = http::HeaderValue::from_static("chat");
                    answer.headers_mut().insert("sec-websocket-protocol", name);
                }
                answer.headers_mut().insert("x-offered", offered.parse().unwrap());
            }
            Ok(answer)
        };
        let Ok(mut socket) = accept_hdr_async(stream, choose).await else { return };
        while let Some(Ok(message)) = socket.next().await {
            if (message.is_text() || message.is_binary()) && socket.send(message).await.is_err() {
                return;
            }
        }
    })
    .await
}

type Socket = WebSocketStream<TcpStream>;

async fn connect(
    setup: &Setup,
    headers: &[(&'static str, String)],
) -> Result<(Socket, Accepted), Error> {
    let address = setup.endpoint.address();
    let url = format!("ws://one.localhost:{}/chat", address.port());
    let mut request = url.into_client_request().unwrap();
    for (name, value) in headers {
        request.headers_mut().insert(*name, HeaderValue::from_str(value).unwrap());
    }
    client_async(request, TcpStream::connect(address).await.unwrap()).await
}

#[test]
fn a_websocket_goes_through_and_holds_its_session_awake() {
    run(async {
        let setup = Setup::with_app(echo().await, open()).await;
        let (mut socket, _) = connect(&setup, &[]).await.unwrap();
        talk(&mut socket).await;
        assert_eq!(*setup.guest.held.borrow(), 1);
        socket.close(None).await.unwrap();
        while socket.next().await.is_some_and(|message| message.is_ok()) {}
        setup.guest.until_held(0).await;
    });
}

#[test]
fn many_websockets_are_open_at_once() {
    run(async {
        let setup = Setup::with_app(echo().await, open()).await;
        let mut sockets = Vec::new();
        for _ in 0..100 {
            sockets.push(connect(&setup, &[]).await.unwrap().0);
        }
        let mut talks = JoinSet::new();
        for (number, mut socket) in sockets.into_iter().enumerate() {
            talks.spawn(async move {
                let message = Message::text(number.to_string());
                socket.send(message.clone()).await.unwrap();
                assert_eq!(socket.next().await.unwrap().unwrap(), message);
            });
        }
        talks.join_all().await;
        setup.guest.until_held(0).await;
    });
}

#[test]
fn a_websocket_chooses_its_port_and_shows_its_token_by_subprotocols() {
    run(async {
        let keys = TokenKeys::generate().unwrap();
        let setup = Setup::new(EndpointOptions::new().tokens(keys.clone())).await;
        let app = echo().await;
        let token = keys.mint("one", app.port(), Duration::from_secs(60)).unwrap();
        let own = format!(
            "lambda-microvms, lambda-microvms.authentication.{}, lambda-microvms.port.{}",
            token.as_str(),
            app.port()
        );
        // The application chooses one of its own.
        let offer = ("sec-websocket-protocol", format!("{own}, superchat, chat"));
        let (mut socket, accepted) = connect(&setup, &[offer]).await.unwrap();
        assert_eq!(accepted.headers()["sec-websocket-protocol"], "chat");
        assert_eq!(accepted.headers()["x-offered"], "superchat, chat");
        talk(&mut socket).await;
        // It is offered none, and the endpoint chooses what browsers insist on.
        let offer = ("sec-websocket-protocol", own.clone());
        let (mut socket, accepted) = connect(&setup, &[offer]).await.unwrap();
        assert_eq!(accepted.headers()["sec-websocket-protocol"], "lambda-microvms");
        assert_eq!(accepted.headers().get("x-offered"), None);
        talk(&mut socket).await;
        let offer = ("sec-websocket-protocol", own.replace("authentication", "auth"));
        assert_eq!(refusal(connect(&setup, &[offer]).await), 403);
        let offer = ("sec-websocket-protocol", format!("{own}, lambda-microvms.port.1"));
        assert_eq!(refusal(connect(&setup, &[offer]).await), 400);
        let offer = ("sec-websocket-protocol", format!("{own}, lambda-microvms.authentication.x"));
        assert_eq!(refusal(connect(&setup, &[offer]).await), 400);
        // A request that is no WebSocket has no subprotocols.
        let header = format!("Sec-WebSocket-Protocol: {own}\r\n");
        let answer = get(setup.endpoint.address(), "one.localhost", "/", &header).await;
        assert_eq!(answer.status, 403);
    });
}

fn refusal(connected: Result<(Socket, Accepted), Error>) -> u16 {
    match connected {
        Err(Error::Http(answer)) => answer.status().as_u16(),
        Err(error) => panic!("{error}"),
        Ok((_, accepted)) => accepted.status().as_u16(),
    }
}

#[test]
fn an_application_that_knows_no_websockets_says_so_itself() {
    run(async {
        let setup = Setup::open().await;
        assert_eq!(refusal(connect(&setup, &[]).await), 200);
        let setup = Setup::with_app(
            App::saying(b"HTTP/1.1 426 Upgrade Required\r\nContent-Length: 0\r\n\r\n").await,
            open(),
        );
        assert_eq!(refusal(connect(&setup.await, &[]).await), 426);
    });
}

#[test]
fn a_guest_that_dies_ends_its_websockets_and_so_does_the_endpoint() {
    run(async {
        let setup = Setup::with_app(echo().await, open()).await;
        let (mut socket, _) = connect(&setup, &[]).await.unwrap();
        talk(&mut socket).await;
        let Setup { endpoint, guest, app, .. } = setup;
        drop(app);
        assert!(socket.next().await.is_none_or(|message| message.is_err()));
        guest.until_held(0).await;
        drop(endpoint);

        let setup = Setup::with_app(echo().await, open()).await;
        let (mut socket, _) = connect(&setup, &[]).await.unwrap();
        talk(&mut socket).await;
        drop(setup.endpoint);
        assert!(socket.next().await.is_none_or(|message| message.is_err()));
    });
}

#[test]
fn an_upgrade_that_was_not_agreed_on_hides_no_request() {
    run(async {
        let setup = Setup::open().await;
        // What follows an upgrade that the application does not make is a request, and looked at as one.
        let first = "GET /a HTTP/1.1\r\nHost: one.localhost\r\nConnection: upgrade\r\n\
            Upgrade: websocket\r\nSec-WebSocket-Version: 777\r\n\r\n";
        let second = "GET /b HTTP/1.1\r\nHost: two.localhost\r\nConnection: close\r\n\r\n";
        let text = exchange(setup.endpoint.address(), format!("{first}{second}")).await;
        let statuses: Vec<_> = text.split("HTTP/1.1 ").skip(1).map(|line| &line[..3]).collect();
        assert_eq!(statuses, ["200", "404"], "{text}");
    });
}
