//! A proxy that makes a TCP link long.
//!
//! Each byte is passed on a fixed time after it came, in both directions: a request waits half of the link's latency, and
//! so does its answer. Order is kept, and the rate is not limited: while some bytes wait, others come. What may wait is
//! bounded, so that the proxy does not become a buffer in front of a slow link that a real server would not have; a bound
//! of twice what comes in during the delay does not slow the link down.
//!
//! Limits: a new connection is accepted at once, where over a real link it would take a round trip.

use std::collections::VecDeque;
use std::net::SocketAddr;
use std::time::{Duration, Instant};

use anyhow::Context;
use clap::Args;
use headwater::clock;
use headwater::units::ByteSize;
use replay::alarm::Alarm;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::tcp::{OwnedReadHalf, OwnedWriteHalf};
use tokio::net::{TcpListener, TcpStream};
use tokio::runtime::{Builder, LocalOptions};

/// The most that is taken from a socket at once.
const PIECE: usize = 128 << 10;

/// The command line.
#[derive(Debug, Args)]
pub(crate) struct Options {
    /// Where to listen.
    #[arg(long)]
    listen: SocketAddr,
    /// Where the server is.
    #[arg(long)]
    to: SocketAddr,
    /// How long a byte is held, each way.
    #[arg(long, value_parser = load::arguments::duration)]
    each_way: Duration,
    /// Bytes that may be held, each way and connection.
    #[arg(long, default_value = "1M")]
    buffer: ByteSize,
}

/// Runs until it is killed.
pub(crate) fn run(options: &Options) -> anyhow::Result<()> {
    let runtime = Builder::new_current_thread().enable_all().build_local(LocalOptions::default())?;
    runtime.block_on(serve(options))
}

async fn serve(options: &Options) -> anyhow::Result<()> {
    let listener = TcpListener::bind(options.listen).await.context("listening")?;
    let line = || Line::new(options.each_way, usize::try_from(options.buffer.0).unwrap_or(usize::MAX));
    loop {
        let (client, _) = listener.accept().await?;
        let (to, there, back) = (options.to, line(), line());
        tokio::task::spawn_local(async move {
            // A connection that ends badly ends for both sides, who say more about it than could be said here.
            let _ = connect(client, to, there, back).await;
        });
    }
}

async fn connect(client: TcpStream, to: SocketAddr, there: Line, back: Line) -> anyhow::Result<()> {
    let server = TcpStream::connect(to).await?;
    client.set_nodelay(true)?;
    server.set_nodelay(true)?;
    let (from_client, to_client) = client.into_split();
    let (from_server, to_server) = server.into_split();
    let ((), ()) = tokio::try_join!(pass(from_client, to_server, there), pass(from_server, to_client, back))?;
    Ok(())
}

/// Passes bytes on in one direction until there are no more.
async fn pass(mut from: OwnedReadHalf, mut to: OwnedWriteHalf, mut line: Line) -> anyhow::Result<()> {
    let mut alarm = Alarm::new()?;
    let mut buffer = vec![0; PIECE];
    let mut open = true;
    // What is being written: it left the line, and its first bytes may be gone.
    let mut leaving: (Vec<u8>, usize) = (Vec::new(), 0);
    loop {
        if leaving.1 == leaving.0.len() {
            match line.due(clock::now()) {
                Some(bytes) => leaving = (bytes, 0),
                None if !open && line.next().is_none() => break,
                None => {}
            }
        }
        let writes = leaving.1 < leaving.0.len();
        let next = line.next().filter(|_| !writes);
        tokio::select! {
            biased;
            rung = async { alarm.until(next.unwrap_or_else(clock::now)).await }, if next.is_some() => rung?,
            written = to.write(&leaving.0[leaving.1..]), if writes => leaving.1 += written?,
            read = from.read(&mut buffer), if open && line.has_room() => {
                let length = read?;
                open = length > 0;
                line.push(clock::now(), &buffer[..length]);
            }
        }
    }
    to.shutdown().await?;
    Ok(())
}

/// Bytes on their way, and when they arrive. Pure: it is told the time.
#[derive(Debug)]
struct Line {
    delay: Duration,
    /// `held` may exceed it by one piece.
    bound: usize,
    held: usize,
    pieces: VecDeque<(Instant, Vec<u8>)>,
}

impl Line {
    const fn new(delay: Duration, bound: usize) -> Self {
        Self { delay, bound, held: 0, pieces: VecDeque::new() }
    }

    const fn has_room(&self) -> bool {
        self.held < self.bound
    }

    fn push(&mut self, now: Instant, bytes: &[u8]) {
        if !bytes.is_empty() {
            self.held += bytes.len();
            self.pieces.push_back((now + self.delay, bytes.to_vec()));
        }
    }

    /// When the next bytes arrive.
    fn next(&self) -> Option<Instant> {
        self.pieces.front().map(|(due, _)| *due)
    }

    /// Takes the next bytes if they have arrived.
    fn due(&mut self, now: Instant) -> Option<Vec<u8>> {
        let (_, bytes) = self.pieces.pop_front_if(|(due, _)| *due <= now)?;
        self.held -= bytes.len();
        Some(bytes)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bytes_come_after_the_delay_and_in_order() {
        let start = clock::now();
        let at = |us| start + Duration::from_micros(us);
        let mut line = Line::new(Duration::from_millis(1), 1 << 20);
        line.push(at(0), b"one");
        line.push(at(300), b"two");
        assert_eq!((line.next(), line.due(at(999))), (Some(at(1000)), None));
        assert_eq!((line.due(at(1000)), line.due(at(1000))), (Some(b"one".to_vec()), None));
        // One that is taken late does not hold up the others.
        assert_eq!((line.due(at(5000)), line.next()), (Some(b"two".to_vec()), None));
    }

    #[test]
    fn what_is_held_is_bounded_and_the_rate_is_not() {
        let start = clock::now();
        let mut line = Line::new(Duration::from_millis(1), 4000);
        // 1000 bytes each 250 us: what is on its way is the rate times the delay, and there is always room.
        let mut received = 0;
        for step in 0..1000 {
            let now = start + Duration::from_micros(250 * step);
            while let Some(bytes) = line.due(now) {
                received += bytes.len();
            }
            assert!(line.has_room());
            line.push(now, &[7; 1000]);
        }
        assert_eq!(received, 996_000);
        line.push(start, &[7; 1000]);
        assert!(!line.has_room());
        line.push(start, b"");
        assert_eq!(line.pieces.len(), 5);
    }

    /// A server that echoes, and a proxy before it.
    async fn proxied(each_way: Duration) -> anyhow::Result<TcpStream> {
        let server = TcpListener::bind("127.0.0.1:0").await?;
        let proxy = TcpListener::bind("127.0.0.1:0").await?;
        let (to, at) = (server.local_addr()?, proxy.local_addr()?);
        tokio::task::spawn_local(async move {
            let (socket, _) = server.accept().await.unwrap();
            let (mut from, mut to) = socket.into_split();
            tokio::io::copy(&mut from, &mut to).await.unwrap();
        });
        tokio::task::spawn_local(async move {
            let (client, _) = proxy.accept().await.unwrap();
            let line = || Line::new(each_way, 100_000);
            connect(client, to, line(), line()).await.unwrap();
        });
        Ok(TcpStream::connect(at).await?)
    }

    #[test]
    fn a_round_trip_takes_no_less_than_twice_the_delay_and_brings_every_byte() {
        let runtime = Builder::new_current_thread().enable_all().build_local(LocalOptions::default()).unwrap();
        runtime.block_on(async {
            let delay = Duration::from_millis(5);
            let mut client = proxied(delay).await.unwrap();
            let start = clock::now();
            client.write_all(b"x").await.unwrap();
            assert_eq!(client.read_u8().await.unwrap(), b'x');
            assert!(clock::now() >= start + 2 * delay);
            // More than the line holds.
            let sent: Vec<u8> = (0..3_000_000_u32).map(|at| u8::try_from(at % 251).unwrap()).collect();
            let (mut from, mut to) = client.into_split();
            let mut received = Vec::new();
            let (written, read) = tokio::join!(
                async {
                    to.write_all(&sent).await?;
                    to.shutdown().await
                },
                from.read_to_end(&mut received)
            );
            written.unwrap();
            assert_eq!(read.unwrap(), sent.len());
            assert!(received == sent);
        });
    }
}
