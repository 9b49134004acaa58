// Streams one answer and verifies every token's chain digest against the prompt's token ids.
//
//	go run . HOST:PORT "prompt" [DIR of `stagemesh certs init`]
package main

import (
	"bytes"
	"context"
	"crypto/rand"
	"crypto/sha256"
	"crypto/tls"
	"crypto/x509"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"
	"time"

	"google.golang.org/genproto/googleapis/rpc/errdetails"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/status"

	pb "stagemesh.example/client/gen/stagemesh/v1"
)

const wait = 2 * time.Minute

func main() {
	address, prompt, certs := argument(1, "127.0.0.1:50051"), argument(2, "Name three colours."), argument(3, "")
	if err := run(address, prompt, certs); err != nil {
		fmt.Fprintln(os.Stderr, "\n"+describe(err))
		os.Exit(1)
	}
}

func argument(index int, fallback string) string {
	if len(os.Args) > index {
		return os.Args[index]
	}
	return fallback
}

func run(address, prompt, certs string) error {
	creds, err := transport(certs)
	if err != nil {
		return err
	}
	connection, err := grpc.NewClient(address, grpc.WithTransportCredentials(creds))
	if err != nil {
		return err
	}
	defer connection.Close()
	client := pb.NewGenerationServiceClient(connection)
	ctx, cancel := context.WithTimeout(context.Background(), wait)
	defer cancel()

	chat := &pb.ChatPrompt{Messages: []*pb.ChatMessage{{Role: "user", Content: prompt}}}
	tokenized, err := client.Tokenize(ctx, &pb.TokenizeRequest{Prompt: &pb.TokenizeRequest_Chat{Chat: chat}})
	if err != nil {
		return err
	}
	id := newID()
	chain := chainStart(id, tokenized.TokenIds)
	stream, err := client.Generate(ctx, &pb.GenerateRequest{
		RequestId: fmt.Sprintf("%x-%x-%x-%x-%x", id[:4], id[4:6], id[6:8], id[8:10], id[10:]),
		Prompt:    &pb.GenerateRequest_Chat{Chat: chat},
		MaxTokens: 64,
	})
	if err != nil {
		return err
	}
	count := 0
	for {
		response, err := stream.Recv()
		if errors.Is(err, io.EOF) {
			return nil
		} else if err != nil {
			return err
		}
		fmt.Print(response.Text)
		for _, token := range response.Tokens {
			chain = link(chain, token.Position, token.TokenId)
			if !bytes.Equal(chain, token.Chain) {
				return fmt.Errorf("the chain does not verify at position %d", token.Position)
			}
			count++
		}
		if finish := response.Finish; finish != nil {
			fmt.Printf("\n%v, %d tokens, every chain link verified, route %s, %d recoveries\n",
				finish.Reason, count, strings.Join(finish.Route, " → "), len(finish.Recoveries))
		}
	}
}

// A coordinator is known by its role, whatever host it runs on: see docs/operations.md.
func transport(certs string) (credentials.TransportCredentials, error) {
	if certs == "" {
		return insecure.NewCredentials(), nil
	}
	pair, err := tls.LoadX509KeyPair(filepath.Join(certs, "client.pem"), filepath.Join(certs, "client.key"))
	if err != nil {
		return nil, err
	}
	authority, err := os.ReadFile(filepath.Join(certs, "ca.pem"))
	if err != nil {
		return nil, err
	}
	roots := x509.NewCertPool()
	roots.AppendCertsFromPEM(authority)
	return credentials.NewTLS(&tls.Config{
		Certificates: []tls.Certificate{pair}, RootCAs: roots, ServerName: "coordinator.stagemesh",
	}), nil
}

// The chain of docs/protocol.md §7.
func chainStart(id [16]byte, prompt []uint32) []byte {
	var ids []byte
	for _, one := range prompt {
		ids = binary.LittleEndian.AppendUint32(ids, one)
	}
	digest := sha256.Sum256(ids)
	start := append([]byte("stagemesh.chain.1"), id[:]...)
	start = binary.LittleEndian.AppendUint32(start, uint32(len(prompt)))
	first := sha256.Sum256(append(start, digest[:]...))
	return first[:16]
}

func link(chain []byte, position, token uint32) []byte {
	next := binary.LittleEndian.AppendUint32(append([]byte(nil), chain...), position)
	digest := sha256.Sum256(binary.LittleEndian.AppendUint32(next, token))
	return digest[:16]
}

func newID() (id [16]byte) {
	rand.Read(id[:]) // never fails: see its documentation
	id[6], id[8] = id[6]&0x0f|0x40, id[8]&0x3f|0x80
	return id
}

// What the mesh says about an error: its reason, its facts, and when to come back.
func describe(err error) string {
	said := status.Convert(err)
	text := fmt.Sprintf("%v: %s", said.Code(), said.Message())
	for _, detail := range said.Details() {
		switch one := detail.(type) {
		case *errdetails.ErrorInfo:
			text += fmt.Sprintf(" [%s %v]", one.Reason, one.Metadata)
		case *errdetails.RetryInfo:
			text += fmt.Sprintf(", try again in %v", one.RetryDelay.AsDuration())
		}
	}
	return text
}
