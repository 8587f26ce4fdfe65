//! Between a program and a TCP server: passes bytes on, until a test asks it to hang, to be slow or to cut.

use std::sync::Arc;
use std::time::Duration;

use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::watch;

/// What is done to what passes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mode {
    /// Passed on.
    Pass,
    /// Kept back, both ways, until the mode is another; new connections wait as well.
    Hang,
    /// What the server says is kept back; what it is told goes through, so that it does it.
    HangAnswers,
    /// Each piece waits so long.
    Slow(Duration),
    /// All connections break, and new ones at once.
    Cut,
}

/// The relay; it ends with the test's runtime.
pub struct Relay {
    port: u16,
    mode: Arc<watch::Sender<Mode>>,
}

impl Relay {
    /// In front of a server on loopback.
    pub async fn start(server: u16) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let port = listener.local_addr().unwrap().port();
        let mode = Arc::new(watch::Sender::new(Mode::Pass));
        let modes = mode.clone();
        tokio::spawn(async move {
            loop {
                let (client, _) = listener.accept().await.unwrap();
                tokio::spawn(connection(client, server, modes.subscribe()));
            }
        });
        Self { port, mode }
    }

    pub fn port(&self) -> u16 {
        self.port
    }

    pub fn set(&self, mode: Mode) {
        self.mode.send_replace(mode);
    }
}

async fn connection(client: TcpStream, server: u16, modes: watch::Receiver<Mode>) {
    let mut cut = modes.clone();
    let both = async {
        passes(&modes, false).await;
        let Ok(server) = TcpStream::connect(("127.0.0.1", server)).await else { return };
        let (from_client, to_client) = client.into_split();
        let (from_server, to_server) = server.into_split();
        tokio::join!(pump(from_client, to_server, modes.clone(), false), pump(from_server, to_client, modes, true));
    };
    tokio::select! {
        () = both => {}
        _ = cut.wait_for(|mode| *mode == Mode::Cut) => {}
    }
}

/// Waits until something may pass.
async fn passes(modes: &watch::Receiver<Mode>, answer: bool) {
    let mut modes = modes.clone();
    let hangs = |mode: &Mode| *mode == Mode::Hang || (answer && *mode == Mode::HangAnswers);
    let mode = modes.wait_for(|mode| !hangs(mode)).await.map(|mode| *mode);
    if let Ok(Mode::Slow(wait)) = mode {
        tokio::time::sleep(wait).await;
    }
}

async fn pump(
    mut from: tokio::net::tcp::OwnedReadHalf,
    mut to: tokio::net::tcp::OwnedWriteHalf,
    modes: watch::Receiver<Mode>,
    answer: bool,
) {
    let mut piece = vec![0; 64 * 1024];
    while let Ok(n) = from.read(&mut piece).await {
        passes(&modes, answer).await;
        if n == 0 || to.write_all(&piece[..n]).await.is_err() {
            break;
        }
    }
    let _ = to.shutdown().await;
}
