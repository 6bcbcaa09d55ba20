//! What a server with 3 hosts and 500 endpoints takes, the program's own text left out, which is large in a debug build. The
//! clients are in the same process, so this is an upper bound; `make bench` measures a server alone.
#![allow(missing_docs, dead_code, clippy::unwrap_used, clippy::expect_used)]

#[path = "server/harness.rs"]
mod harness;

use harness::Server;

fn resident_kib() -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap();
    let line = status.lines().find(|line| line.starts_with("RssAnon:")).unwrap();
    line.split_whitespace().nth(1).unwrap().parse().unwrap()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_server_with_three_hosts_and_500_endpoints_stays_below_60_mb() {
    let server = Server::start().await;
    let mut watches = Vec::new();
    let mut agents = Vec::new();
    for i in 0..3 {
        let agent = server.host(&format!("h{i}")).await;
        let mut blocks = Vec::new();
        for held in 0..3 {
            blocks.push(agent.lease("managed", held).await.unwrap());
        }
        watches.push(agent.watch().await);
        agents.push((agent, blocks));
    }
    let puts = (0..500u32).map(|i| {
        let (agent, blocks) = &agents[i as usize % 3];
        let n = i / 3;
        let endpoint = agent.endpoint(&blocks[n as usize / 60], &format!("c{i}"), 2 + n % 60);
        async move { agent.put(&endpoint).await.unwrap() }
    });
    futures_util::future::join_all(puts.collect::<Vec<_>>()).await;
    for watch in &mut watches {
        let mut seen = 0;
        while seen < 500 {
            seen += watch.next().await.map_or(0, |message| match message {
                model::Watch::Delta { changes, .. } => changes.len(),
                _ => 0,
            });
        }
    }
    let all: Vec<model::Endpoint> = server.admin().get("/v1/environments/default/endpoints").await.unwrap();
    assert_eq!(all.len(), 500);
    let resident = resident_kib();
    // The program's text is some 10 MB where it is released.
    assert!(resident < 48_000, "{resident} KiB");
    println!("{resident} KiB with the clients");
}
